// The text: one pane per trace, a listbox of tokens, colored by expert; and the search in it.

const INVISIBLE = /(\n|\t|[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs})/u;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "onclick") made.addEventListener("click", value);
    else if (key === "style") for (const [property, size] of Object.entries(value)) made.style.setProperty(property, size);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Name of an invisible character: a glyph for a new line or tab, else its code.
function visible(character) {
  if (character === "\n") return "↵";
  if (character === "\t") return "⇥";
  const code = character.codePointAt(0).toString(16).toUpperCase();
  return "[" + "U+" + code.padStart(4, "0") + "]";
}

// Append a token's text, with invisible characters shown. Text of a trace never becomes markup.
function fill(node, text, breaks) {
  for (const part of text.split(INVISIBLE)) {
    if (part === "") continue;
    if (!INVISIBLE.test(part)) node.append(/^\p{M}/u.test(part) ? "◌" + part : part);
    else node.append(element("i", null, visible(part)), breaks && /[\n\t]/.test(part) ? part : "");
  }
  if (text === "") node.append(element("i", null, "[empty]"));
  return node;
}

// A token's text in words: for labels, and what is announced.
function spoken(text) {
  if (text === "") return "empty";
  if (/^ +$/.test(text)) return "space";
  return text.split(INVISIBLE).map((part) => {
    if (part === "\n") return "new line";
    return INVISIBLE.test(part) ? visible(part) : part;
  }).filter(Boolean).join(" ");
}

function makePanes(data, onChoose) {
  const holder = document.getElementById("text");
  const several = data.domains.length > 1 || data.document && data.document.some((number) => number !== data.document[0]);
  const panes = data.traces.map((trace, index) => {
    const tokens = Array.from({ length: data.tokens });
    const list = element("div", { class: "tokens", role: "listbox", tabindex: "0", id: "tokens-" + index });
    let group = null, previous = null;
    for (let n = 0; n < data.tokens; n++) {
      const document_ = data.document ? data.document[n] : 0;
      if (document_ !== previous || !group) {
        group = element("div", { class: "document", role: "group", "aria-label": originOf(data, n) });
        if (several) group.append(element("span", { class: "origin" }, originOf(data, n)));
        list.append(group);
        previous = document_;
      }
      const text = data.texts[data.text[n]], label = text.trim() ? null : spoken(text);
      tokens[n] = fill(element("span", { class: "t", role: "option", id: "t" + index + "-" + n, "aria-label": label }), text, true);
      tokens[n].dataset.n = n;
      group.append(tokens[n]);
    }
    const title = data.traces.length > 1 ? element("h2", null, "AB"[index] + " · " + trace.name) : null;
    const pane = element("div", { class: "pane" }, title, list);
    list.addEventListener("click", (event) => {
      const chosen = event.target.closest(".t");
      if (chosen) onChoose(Number(chosen.dataset.n), index);
    });
    holder.append(pane);
    return { pane, list, tokens };
  });
  if (panes.length > 1) keepTogether(panes.map((pane) => pane.list));
  return panes;
}

function originOf(data, n) {
  const domain = data.domains.length > 1 && data.domain ? data.domains[data.domain[n]] + " · " : "";
  return domain + "Document " + (data.document ? data.document[n] : 0);
}

// Scroll two lists together: their lines break alike.
function keepTogether(lists) {
  let leader = null, timer = 0;
  lists.forEach((list, index) => {
    list.addEventListener("scroll", () => {
      if (leader !== null && leader !== index) return;
      leader = index;
      clearTimeout(timer);
      timer = setTimeout(() => { leader = null; }, 120);
      lists[1 - index].scrollTop = list.scrollTop;
    }, { passive: true });
  });
}

// Colors by rank of load, the same in both panes: eight hues, then the same with an underline.
function ranksOf(data, layer) {
  const total = new Int32Array(data.experts[layer]);
  for (const trace of data.traces) trace.layers[layer].count.forEach((count, expert) => { total[expert] += count; });
  const order = Array.from(total.keys()).sort((a, b) => total[b] - total[a] || a - b);
  const rank = new Int32Array(order.length);
  order.forEach((expert, place) => { rank[expert] = place; });
  return { order, rank };
}

function colorOf(rank) {
  return "c" + (rank % 8) + " u" + (Math.floor(rank / 8) % 5);
}

function largestWeight(data, trace, layer, expert) {
  const found = tokensOf(data, trace, layer, expert);
  return found.length && found[0].weight > 0 ? found[0].weight : 1;
}

// Set the class of each token: color by the expert of the chosen slot, or of the highlighted expert.
function paint(data, panes, state, marks) {
  const { layer, slot, expert } = state, N = data.tokens;
  data.traces.forEach((trace, index) => {
    const { tokens } = panes[index];
    const largest = expert === null ? trace.layers[layer].largest : largestWeight(data, trace, layer, expert);
    const K = trace.topK, base = layer * K * N;
    for (let n = 0; n < N; n++) {
      let at = -1, name = data.generated && data.generated[n] === 1 ? "t generated" : "t";
      if (expert === null) {
        if (slot < K && trace.expert[base + slot * N + n] >= 0) at = base + slot * N + n;
      } else {
        for (let k = 0; k < K && at < 0; k++) if (trace.expert[base + k * N + n] === expert) at = base + k * N + n;
      }
      if (at >= 0) {
        const strength = trace.weight ? Math.min(9, Math.max(0, Math.round(9 * trace.weight[at] / largest))) : 5;
        name += (expert === null ? " " + colorOf(marks.rank[trace.expert[at]]) : " one") + " a" + strength;
      }
      if (marks.differs && marks.differs.has(n)) name += " differs";
      if (marks.hits.has(n)) name += n === marks.hit ? " hit now" : " hit";
      const token = tokens[n];
      if (token.className !== name) token.className = name;
      if (state.numbers && expert === null && at >= 0) token.dataset.e = trace.expert[at];
      else if (token.dataset.e !== undefined) delete token.dataset.e;
    }
  });
}

// Positions of the tokens where a query begins, and of all tokens that it covers. Letters of either case.
function search(data, query) {
  if (!search.ends) {
    search.parts = Array.from(data.text, (text) => data.texts[text].toLowerCase());
    search.whole = search.parts.join("");
    let end = 0;
    search.ends = search.parts.map((part) => (end += part.length));
  }
  const starts = [], covered = new Set(), wanted = query.toLowerCase();
  if (!wanted) return { starts, covered };
  for (let at = search.whole.indexOf(wanted); at >= 0; at = search.whole.indexOf(wanted, at + wanted.length)) {
    let low = 0, high = search.ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (search.ends[middle] > at) high = middle;
      else low = middle + 1;
    }
    starts.push(low);
    for (let n = low; n < search.ends.length && search.ends[n] - search.parts[n].length < at + wanted.length; n++) covered.add(n);
  }
  return { starts, covered };
}
