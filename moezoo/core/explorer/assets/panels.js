// The details: path of a token, an expert's tokens, load by layer and expert, differences between two traces.

const NEAR_TIE = 0.01, PLACES = 12;

// Replace the content of a panel; the focus stays on the element of the same key.
function replace(id, title, ...children) {
  const panel = document.getElementById(id);
  const key = panel.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  panel.replaceChildren(...[title && element("h2", null, title), ...children].filter(Boolean));
  if (key) {
    const again = panel.querySelector('[data-key="' + CSS.escape(key) + '"]');
    if (again) again.focus();
  }
}

function note(text) {
  return element("p", { class: "note" }, text);
}

// A token between those before and after it, up to a number of characters on each side.
function inContext(data, token, reach) {
  const node = element("span", { class: "context" });
  const side = (step) => {
    const found = [];
    let size = 0;
    for (let n = token + step; n >= 0 && n < data.tokens && size < reach; n += step) {
      if (data.document && data.document[n] !== data.document[token]) break;
      size += data.texts[data.text[n]].length;
      found.push(data.texts[data.text[n]]);
    }
    return step < 0 ? found.reverse().join("") : found.join("");
  };
  const before = side(-1), after = side(1);
  if (before) fill(node, before);
  node.append(fill(element("mark"), data.texts[data.text[token]]));
  if (after) fill(node, after);
  return node;
}

function showToken(data, state, act) {
  if (state.token === null) {
    replace("token", null, note("Choose a token in the text, to see its path through all layers."));
    return;
  }
  const n = state.token;
  const quote = element("p", { class: "quote" }, inContext(data, n, 30));
  const facts = [originOf(data, n)];
  if (data.generated && data.generated[n] === 1) facts.push("generated");
  data.traces.forEach((trace, index) => {
    if (!trace.loss || !Number.isFinite(trace.loss[n])) return;
    facts.push((data.traces.length > 1 ? "AB"[index] + ": " : "") + "loss " + number(trace.loss[n], 2) + " nats");
  });
  const two = data.traces.length > 1;
  const heads = ["Layer", two ? "" : null, "Experts and weights", "Runner-up"].filter((head) => head !== null);
  const table = element("table", null,
    element("caption", { class: "hidden" }, "Experts of the token in each layer"),
    element("thead", null, element("tr", null, ...heads.map((head) =>
      element("th", { scope: "col" }, head || element("span", { class: "hidden" }, "Trace"))))),
    element("tbody", null, ...data.layers.flatMap((_, layer) => tokenRows(data, state, act, layer, n))));
  replace("token", "Token " + grouped(data.first + n), quote, note(facts.join(" · ")), table,
    note("The runner-up is the best expert that was not chosen; its margin, by how much the last chosen one leads, as a share. ≈ marks a near tie, below 1 %."));
}

function tokenRows(data, state, act, layer, n) {
  const sets = data.traces.map((trace) => choices(data, trace, layer, n));
  const differ = sets.length > 1 && differs(data, layer, n);
  return data.traces.map((trace, index) => {
    const current = layer === state.layer, at = layer * data.tokens + n;
    const row = element("tr", { class: [current ? "current" : "", index === 0 ? "first" : ""].join(" ").trim() });
    if (index === 0) {
      row.append(element("th", { scope: "row", rowspan: String(sets.length) }, element("button", {
        type: "button", tabindex: current ? "0" : "-1", "data-key": "layer" + layer,
        "aria-label": "Layer " + data.layers[layer] + (differ ? ", differs" : ""), onclick: () => act({ layer }),
      }, data.layers[layer] + (differ ? " ≠" : ""))));
    }
    if (sets.length > 1) row.append(element("td", null, "AB"[index]));
    const others = differ ? sets[1 - index].map((choice) => choice.expert) : null;
    const chips = sets[index].map((choice, place) => chip(data, state, act, layer, index, place, choice, trace, others));
    row.append(element("td", null, element("div", { class: "chips" }, ...(chips.length ? chips : ["not recorded"]))));
    const margin = trace.margin ? trace.margin[at] : NaN, near = margin < NEAR_TIE;
    const next = trace.runner_up ? trace.runner_up[at] : -1;
    row.append(element("td", { class: near ? "runner near" : "runner" },
      next < 0 ? null : element("button", {
        type: "button", class: "chip", tabindex: current ? "0" : "-1", "data-key": ["next", layer, index].join("-"),
        "aria-label": "Runner-up: expert " + next, onclick: () => act({ layer, expert: next, view: index }),
      }, String(next)), (near ? " ≈ " : " ") + percent(margin)));
    return row;
  });
}

function chip(data, state, act, layer, index, place, choice, trace, others) {
  const other = others !== null && !others.includes(choice.expert);
  const weight = choice.weight === null ? "" : number(choice.weight, 2);
  const width = choice.weight === null ? 0 : Math.max(0, Math.min(1, choice.weight / trace.layers[layer].largest)) * 100;
  const label = "Expert " + choice.expert + (weight ? ", weight " + weight : "") + (choice.dropped ? ", dropped" : "") + (other ? ", not in the other trace" : "");
  return element("button", {
    type: "button", class: "chip" + (other ? " other" : "") + (choice.dropped ? " dropped" : ""), "aria-label": label, title: label,
    tabindex: layer === state.layer ? "0" : "-1", "data-key": ["chip", layer, index, place].join("-"),
    style: { "--w": width.toFixed(0) + "%" }, onclick: () => act({ layer, expert: choice.expert, view: index }),
  }, String(choice.expert), weight ? element("small", null, weight.replace(/^0/, "")) : null);
}

function showExpert(data, state, act, marks) {
  const { layer, expert } = state;
  if (expert === null) {
    replace("expert", null, note("Choose an expert above the text, in a token's path or in the load, to see the tokens that it takes."));
    return;
  }
  const trace = data.traces[state.view], found = tokensOf(data, trace, layer, expert);
  const mean = found.reduce((sum, entry) => sum + entry.weight, 0) / found.length;
  const title = "Expert " + expert + " of layer " + data.layers[layer] + (data.traces.length > 1 ? " · " + "AB"[state.view] : "");
  const facts = [
    plural(found.length, "token"), percent(trace.layers[layer].count[expert] / trace.layers[layer].total) + " of the load",
    number(relativeLoad(data, trace, layer, expert), 2) + " × even",
  ];
  if (trace.weight && found.length) facts.push("mean weight " + number(mean, 2));
  const rank = marks.rank[expert];
  const row = element("div", { class: "row" },
    element("button", { type: "button", "data-key": "less", onclick: () => act({ expert: marks.order[(rank + marks.order.length - 1) % marks.order.length] }) }, "‹ more load"),
    element("button", { type: "button", "data-key": "more", onclick: () => act({ expert: marks.order[(rank + 1) % marks.order.length] }) }, "less load ›"),
    element("button", { type: "button", "data-key": "clear", onclick: () => act({ expert: null }) }, "Clear"));
  replace("expert", title, note(facts.join(" · ")), row, domainBars(data, found), favoriteChips(data, found), places(data, state, act, found));
}

function domainBars(data, found) {
  if (data.domains.length < 2) return null;
  const shares = domainShares(data, found), largest = Math.max(...shares.map((entry) => entry.share)) || 1;
  return element("div", null, element("h3", null, "Share of each domain's tokens"),
    element("ul", { class: "bars" }, ...shares.map((entry) => bar(entry.name, entry.share / largest, percent(entry.share)))));
}

function bar(name, share, value) {
  return element("li", null, element("span", null, name), element("span", { class: "bar", style: { "--w": (share * 100).toFixed(1) + "%" } }),
    element("span", { class: "value" }, value));
}

function favoriteChips(data, found) {
  const texts = favoriteTexts(data, found).slice(0, PLACES);
  if (!texts.length) return null;
  return element("div", null, element("h3", null, "Tokens it takes most often"),
    element("div", { class: "chips" }, ...texts.map((entry) => element("span", { class: "chip" },
      fill(element("span", { class: "context" }), entry.text === " " ? "␣" : entry.text), element("small", null, entry.taken + " of " + entry.of)))));
}

function places(data, state, act, found) {
  if (!found.length) return note("No token of this page chose it.");
  return element("div", null, element("h3", null, found[0].weight === null ? "Its tokens in context" : "Largest weights in context"),
    element("ol", { class: "places" }, ...found.slice(0, PLACES).map(({ token, weight }, place) => element("li", null,
      element("button", { type: "button", "data-key": "place" + place, onclick: () => act({ token }) },
        element("span", { class: "value" }, weight === null ? "#" + token : number(weight, 2)), inContext(data, token, 26))))));
}

function showDifferences(data, state, act, found) {
  if (!found) return;
  const here = found[state.layer].length, largest = Math.max(1, ...found.map((tokens) => tokens.length));
  const start = found.findIndex((tokens) => tokens.length);
  const bars = element("ul", { class: "bars" }, ...found.map((tokens, layer) => element("li", null,
    element("button", {
      type: "button", "data-key": "layer" + layer, "aria-pressed": String(layer === state.layer), onclick: () => act({ layer }),
      "aria-label": "Layer " + data.layers[layer] + ": " + plural(tokens.length, "token") + " with other experts",
    }, "Layer " + data.layers[layer]),
    element("span", { class: "bar", style: { "--w": (tokens.length / largest * 100).toFixed(1) + "%" } }),
    element("span", { class: "value" }, grouped(tokens.length)))));
  const row = element("div", { class: "row" },
    element("button", { type: "button", "data-key": "back", disabled: !here, onclick: () => act.difference(-1) }, "‹ previous"),
    element("button", { type: "button", "data-key": "next", disabled: !here, onclick: () => act.difference(1) }, "next ›"));
  replace("differences", null,
    element("p", null, "Layer " + data.layers[state.layer] + ": " + grouped(here) + " of " + grouped(data.tokens) + " tokens (" + percent(here / data.tokens) + ") have other experts in B."),
    note(start < 0 ? "No layer differs." : "The first layer that differs is " + data.layers[start] + ". A bar over a token marks it in the text."), row, bars);
}

// --- load by layer and expert ---------------------------------------------------------------------------------------

const GUTTER = 30, TOP = 5, AXIS = 18; // pixels
const DOUBLINGS = 2; // of an even load, that have the strongest color

function mapLayout(data, canvas) {
  const width = canvas.clientWidth, columns = Math.max(...data.experts), rows = data.layers.length;
  const cell = Math.max(6, Math.min(18, Math.floor(210 / rows)));
  return { width, columns, rows, cell, step: (width - GUTTER) / columns, height: TOP + rows * cell + AXIS };
}

function colors(name) {
  const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--map-" + name).trim().split(/\s+/).map(Number);
  return [red, green, blue];
}

function blend(first, second, share) {
  return "rgb(" + first.map((value, index) => Math.round(value + (second[index] - value) * share)).join(" ") + ")";
}

function drawMap(data, state) {
  const canvas = document.getElementById("map"), layout = mapLayout(data, canvas), ratio = window.devicePixelRatio || 1;
  if (!layout.width) return;
  canvas.style.height = layout.height + "px";
  canvas.width = Math.round(layout.width * ratio);
  canvas.height = Math.round(layout.height * ratio);
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), quiet = style.getPropertyValue("--quiet").trim();
  const [less, even, more] = ["less", "even", "more"].map(colors);
  context.scale(ratio, ratio);
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.textBaseline = "middle";
  const gap = layout.step > 4 ? 1 : 0, line = layout.cell > 6 ? 1 : 0, every = Math.ceil(13 / layout.cell);
  data.layers.forEach((name, layer) => {
    const top = TOP + layer * layout.cell;
    if (layer === state.layer || layer % every === 0 && Math.abs(layer - state.layer) >= every) {
      context.fillStyle = layer === state.layer ? ink : quiet;
      context.textAlign = "right";
      context.fillText(String(name), GUTTER - 8, top + layout.cell / 2);
    }
    for (let expert = 0; expert < data.experts[layer]; expert++) {
      const value = mapValue(data, state, layer, expert), strength = state.change ? value : Math.log2(value) / DOUBLINGS;
      context.fillStyle = blend(even, strength < 0 ? less : more, Math.min(1, Math.abs(strength)));
      context.fillRect(GUTTER + expert * layout.step, top, layout.step - gap, layout.cell - line);
    }
  });
  context.strokeStyle = ink;
  context.lineWidth = 1.5;
  context.strokeRect(GUTTER - 1, TOP + state.layer * layout.cell - 0.5, data.experts[state.layer] * layout.step + 0.5, layout.cell);
  if (state.expert !== null) {
    context.lineWidth = 2.5;
    context.strokeRect(GUTTER + state.expert * layout.step - 1, TOP + state.layer * layout.cell - 1, layout.step + 1, layout.cell + 1);
  }
  context.fillStyle = quiet;
  const middleExpert = Math.floor(layout.columns / 2);
  for (const expert of new Set([0, middleExpert, layout.columns - 1])) {
    context.textAlign = expert === 0 ? "left" : expert === middleExpert ? "center" : "right";
    context.fillText(String(expert), GUTTER + (expert + (expert === 0 ? 0 : expert === middleExpert ? 0.5 : 1)) * layout.step, layout.height - AXIS / 2 + 2);
  }
}

// Load relative to an even one; or by how much B's exceeds A's.
function mapValue(data, state, layer, expert) {
  if (!state.change) return relativeLoad(data, data.traces[state.view], layer, expert);
  return relativeLoad(data, data.traces[1], layer, expert) - relativeLoad(data, data.traces[0], layer, expert);
}

function mapCell(data, canvas, event) {
  const layout = mapLayout(data, canvas), box = canvas.getBoundingClientRect();
  const layer = Math.floor((event.clientY - box.top - TOP) / layout.cell), expert = Math.floor((event.clientX - box.left - GUTTER) / layout.step);
  return layer >= 0 && layer < layout.rows && expert >= 0 && expert < data.experts[layer] ? { layer, expert } : null;
}

function describeLayer(data, state) {
  const loads = Array.from({ length: data.experts[state.layer] }, (_, expert) => mapValue(data, state, state.layer, expert));
  const ends = [Math.min(...loads), Math.max(...loads)].map((load) => number(load, 2).replace("-", "−"));
  return "Layer " + data.layers[state.layer] + ": from " + ends[0] + " to " + ends[1] + " × even";
}

function describeCell(data, state, layer, expert) {
  const value = mapValue(data, state, layer, expert), trace = data.traces[state.view];
  const where = "Layer " + data.layers[layer] + ", expert " + expert + ": ";
  if (state.change) return where + (value >= 0 ? "+" : "−") + number(Math.abs(value), 2) + " × even in B";
  return where + number(value, 2) + " × even, " + plural(trace.layers[layer].count[expert] || 0, "token");
}
