// State, what it shows, and what the reader does.

function start(data) {
  const $ = (id) => document.getElementById(id);
  const two = data.traces.length > 1, found = two ? differences(data) : null;
  const differ = found && found.map((tokens) => new Set(tokens));
  const state = { layer: 0, slot: 0, token: null, expert: null, view: 0, change: false, numbers: false, hit: -1, tab: "token" };
  const marks = { rank: null, order: null, differs: null, hits: new Set(), hit: null, starts: [] };
  const layerCount = data.layers.length;
  let announcing = 0;

  const act = (changes) => update(changes);
  act.difference = (step) => nextOf(found ? found[state.layer] : [], step, "No token differs in this layer");
  const panes = makePanes(data, (token, view) => update({ token, view, tab: "token" }));

  function update(changes) {
    const before = { ...state };
    if ("layer" in changes && changes.layer !== state.layer && !("expert" in changes)) changes.expert = null;
    if (!("tab" in changes) && "expert" in changes && changes.expert !== null) changes.tab = "expert";
    Object.assign(state, changes);
    state.layer = Math.min(Math.max(state.layer, 0), layerCount - 1);
    if (state.expert !== null && state.expert >= data.experts[state.layer]) state.expert = null;
    show(before, changes);
    announce(before);
    remember();
  }

  function show(before, changes) {
    const first = !marks.rank, changed = (...names) => first || names.some((name) => before[name] !== state[name]);
    if (changed("layer")) Object.assign(marks, ranksOf(data, state.layer), { differs: differ && differ[state.layer] });
    marks.hit = state.hit >= 0 ? marks.starts[state.hit] : null;
    if (changed("layer", "slot", "expert", "numbers") || "hit" in changes) paint(data, panes, state, marks);
    if (changed("layer", "slot", "expert", "numbers", "view", "tab")) showBar();
    if (changed("layer", "token")) showToken(data, state, act);
    if (changed("layer", "expert", "view")) showExpert(data, state, act, marks);
    if (changed("layer")) showDifferences(data, state, act, found);
    if (changed("layer", "expert", "view", "change")) {
      drawMap(data, state);
      showLoad();
    }
    if (before.token !== state.token) moveTo(before.token, state.token);
    else if ("hit" in changes && marks.hit !== null) panes[0].tokens[marks.hit].scrollIntoView({ block: "nearest" });
  }

  function showBar() {
    const name = data.layers[state.layer];
    $("layer-name").textContent = "Layer " + name;
    $("layer").value = state.layer;
    $("layer").setAttribute("aria-valuetext", "Layer " + name);
    $("previous-layer").disabled = state.layer === 0;
    $("next-layer").disabled = state.layer === layerCount - 1;
    $("slot").value = state.slot;
    $("slot").disabled = state.expert !== null;
    $("numbers").setAttribute("aria-pressed", state.numbers);
    $("text").classList.toggle("numbers", state.numbers);
    panes.forEach(({ pane, list }, index) => {
      pane.toggleAttribute("data-off", two && index !== state.view);
      const what = state.expert === null ? "colored by expert" : "tokens of expert " + state.expert;
      list.setAttribute("aria-label", "Text" + (two ? " of " + data.traces[index].name : "") + ", layer " + name + ", " + what);
    });
    for (const [index, button] of Array.from($("views").children).entries()) button.setAttribute("aria-pressed", index === state.view);
    for (const tab of $("tabs").children) {
      const chosen = tab.id === "tab-" + state.tab;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      $(tab.getAttribute("aria-controls")).hidden = !chosen;
    }
    showLegend();
  }

  function showLegend() {
    const legend = $("legend"), trace = data.traces[state.view], { count, total } = trace.layers[state.layer];
    const held = legend.contains(document.activeElement) ? document.activeElement.dataset.expert : null;
    const first = state.expert === null ? marks.order[0] : state.expert;
    legend.setAttribute("aria-label", "Experts of layer " + data.layers[state.layer] + " by load");
    legend.replaceChildren(...marks.order.map((expert) => element("button", {
      type: "button", "data-expert": expert, "aria-pressed": String(expert === state.expert), tabindex: expert === first ? "0" : "-1",
      "aria-label": "Expert " + expert + ", " + percent((count[expert] || 0) / total) + " of the load",
      onclick: () => update({ expert: expert === state.expert ? null : expert }),
    }, element("span", { class: "t swatch a9 " + colorOf(marks.rank[expert]) }), String(expert), element("small", null, percent((count[expert] || 0) / total)))));
    const again = held !== null && legend.querySelector('[data-expert="' + held + '"]');
    if (again) again.focus();
  }

  function showLoad() {
    const trace = data.traces[state.view];
    $("load-note").textContent = state.change
      ? "layers down, experts across: B's load less A's, in even loads"
      : "layers down, experts across" + (two ? ": " + "AB"[state.view] + " · " + trace.name : "");
    document.querySelector(".scale").replaceChildren(...(state.change ? ["−1", "equal", "+1"] : ["¼", "½", "even", "2 ×", "4 ×"]).map((text) => element("span", null, text)));
    $("map-cell").textContent = state.expert === null ? describeLayer(data, state) : describeCell(data, state, state.layer, state.expert);
    $("map").setAttribute("aria-label", "Load by layer and expert; arrow keys move");
    const toggle = $("change");
    if (toggle) toggle.setAttribute("aria-pressed", state.change);
  }

  function moveTo(previous, token) {
    panes.forEach(({ list, tokens }, index) => {
      if (previous !== null) tokens[previous].removeAttribute("aria-selected");
      if (token === null) return list.removeAttribute("aria-activedescendant");
      tokens[token].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", tokens[token].id);
      if (index === 0 || index === state.view) tokens[token].scrollIntoView({ block: "nearest" });
    });
  }

  function announce(before) {
    const trace = data.traces[state.view];
    let text = null;
    if (before.token !== state.token && state.token !== null || before.layer !== state.layer && state.token !== null) {
      const chosen = choices(data, trace, state.layer, state.token)
        .map((choice) => choice.expert + (choice.weight === null ? "" : " at " + number(choice.weight, 2)));
      text = spoken(data.texts[data.text[state.token]]) + ". Layer " + data.layers[state.layer] + ", experts " + chosen.join(", ");
      if (differ && differ[state.layer].has(state.token)) text += ". Differs";
    } else if (before.layer !== state.layer) text = "Layer " + data.layers[state.layer];
    if (before.expert !== state.expert && state.expert !== null) text = describeCell(data, { ...state, change: false }, state.layer, state.expert);
    if (before.expert !== null && state.expert === null && before.layer === state.layer) text = "Colored by expert";
    if (text) say(text);
  }

  function say(text) {
    clearTimeout(announcing);
    announcing = setTimeout(() => { $("live").textContent = text; }, 60);
  }

  function remember() {
    const parts = ["layer=" + data.layers[state.layer]];
    if (state.token !== null) parts.push("token=" + (data.first + state.token));
    if (state.expert !== null) parts.push("expert=" + state.expert);
    try { history.replaceState(null, "", "#" + parts.join("&")); } catch (error) { /* not for this address */ }
  }

  function recall() {
    const parts = new URLSearchParams(location.hash.slice(1)), integer = (name) => (/^\d+$/.test(parts.get(name) || "") ? Number(parts.get(name)) : null);
    const layer = data.layers.indexOf(integer("layer")), token = integer("token");
    return {
      layer: Math.max(layer, 0), expert: integer("expert"),
      token: token !== null && token >= data.first && token < data.first + data.tokens ? token - data.first : null,
    };
  }

  // The next position of an ascending list after the chosen token, around its end.
  function nextOf(positions, step, none) {
    if (!positions.length) return say(none);
    const from = state.token === null ? (step > 0 ? -1 : data.tokens) : state.token;
    const next = step > 0 ? positions.find((n) => n > from) : positions.findLast((n) => n < from);
    update({ token: next === undefined ? (step > 0 ? positions[0] : positions[positions.length - 1]) : next });
  }

  function find(query) {
    const { starts, covered } = search(data, query);
    Object.assign(marks, { hits: covered, starts });
    update({ hit: starts.length ? 0 : -1 });
    showHits(query);
  }

  function showHits(query) {
    $("hits").textContent = !query ? "" : marks.starts.length ? grouped(state.hit + 1) + " of " + grouped(marks.starts.length) : "none";
  }

  function nextHit(step) {
    if (!marks.starts.length) return;
    const hit = (state.hit + step + marks.starts.length) % marks.starts.length;
    update({ hit, token: marks.starts[hit] });
    showHits($("query").value);
  }

  function stepExpert(step) {
    const place = state.expert === null ? (step > 0 ? -1 : 0) : marks.rank[state.expert];
    update({ expert: marks.order[(place + step + marks.order.length) % marks.order.length] });
  }

  function stepToken(step) {
    const token = state.token === null ? 0 : Math.min(Math.max(state.token + step, 0), data.tokens - 1);
    update({ token });
  }

  function firstExpert() {
    if (state.token === null) return;
    const chosen = choices(data, data.traces[state.view], state.layer, state.token)[state.slot];
    if (chosen) update({ expert: chosen.expert });
  }

  function nextTheme() {
    const order = ["auto", "light", "dark"];
    theme = order[(order.indexOf(theme) + 1) % 3];
    try { localStorage.setItem("moezoo-theme", theme); } catch (error) { /* storage is off: it lasts as long as the page */ }
    applyTheme();
  }

  function applyTheme() {
    showTheme();
    $("theme").textContent = "Theme: " + theme;
    drawMap(data, state);
  }

  const keys = {
    j: () => update({ layer: state.layer + 1 }), k: () => update({ layer: state.layer - 1 }),
    l: () => stepToken(1), h: () => stepToken(-1), "/": () => $("query").focus(),
    n: () => nextHit(1), N: () => nextHit(-1), "]": () => stepExpert(1), "[": () => stepExpert(-1),
    x: () => update({ numbers: !state.numbers }), t: nextTheme, "?": () => $("help").showModal(),
  };
  if (two) Object.assign(keys, { d: () => act.difference(1), D: () => act.difference(-1) });
  const arrows = {
    ArrowDown: keys.j, ArrowUp: keys.k, ArrowRight: keys.l, ArrowLeft: keys.h, Enter: firstExpert,
    Home: () => update({ token: 0 }), End: () => update({ token: data.tokens - 1 }),
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    $("tip").hidden = true;
    const target = event.target;
    if (event.key === "Escape") return void onEscape(target);
    if (target.matches("input, select, textarea")) return;
    let action = $("letters").checked ? keys[event.key] : null;
    if (event.key in arrows && (target === document.body || target.classList.contains("tokens"))) action = arrows[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  function onEscape(target) {
    if (target === $("query")) {
      $("query").value = "";
      find("");
      panes[state.view].list.focus();
    } else if (state.expert !== null) update({ expert: null });
    else update({ token: null });
  }

  // Arrow keys inside the legend or the tabs, each of which is one stop of the tab key.
  function onListKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], buttons = Array.from(event.currentTarget.children).filter((button) => !button.hidden);
    const end = { Home: 0, End: buttons.length - 1 }[event.key], at = buttons.indexOf(document.activeElement);
    const next = step ? buttons[Math.min(Math.max(at + step, 0), buttons.length - 1)] : buttons[end];
    if (!next) return;
    event.preventDefault();
    event.stopPropagation();
    next.focus();
    if (next.getAttribute("role") === "tab") next.click();
  }

  function onMapKey(event) {
    const move = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const layer = Math.min(Math.max(state.layer + move[0], 0), layerCount - 1);
    const expert = state.expert === null ? 0 : Math.min(Math.max(state.expert + move[1], 0), data.experts[layer] - 1);
    update({ layer, expert });
  }

  // A token's experts beside the mouse; what is selected is announced and in the details.
  function showTip(event) {
    const token = event.target.closest && event.target.closest(".tokens .t"), tip = $("tip");
    tip.hidden = !token;
    if (!token) return;
    const trace = data.traces[Number(token.id[1])], chosen = choices(data, trace, state.layer, Number(token.dataset.n));
    const texts = chosen.slice(0, 4).map((choice) => choice.expert + (choice.weight === null ? "" : " at " + number(choice.weight, 2)));
    tip.textContent = (chosen.length ? "Expert " : "Not recorded") + texts.join(", ") + (chosen.length > 4 ? ", …" : "");
    const box = token.getClientRects()[0], left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (box.top > 40 ? box.top - tip.offsetHeight - 6 : box.bottom + 8) + "px";
  }

  function listen() {
    $("text").addEventListener("mouseover", showTip);
    $("text").addEventListener("mouseleave", showTip);
    $("text").addEventListener("scroll", showTip, { capture: true, passive: true });
    document.addEventListener("keydown", onKey);
    for (const id of ["legend", "tabs"]) $(id).addEventListener("keydown", onListKey);
    for (const tab of $("tabs").children) tab.onclick = () => update({ tab: tab.getAttribute("aria-controls") });
    $("previous-layer").onclick = keys.k;
    $("next-layer").onclick = keys.j;
    $("layer").oninput = (event) => update({ layer: Number(event.target.value) });
    $("slot").onchange = (event) => update({ slot: Number(event.target.value) });
    $("numbers").onclick = keys.x;
    $("theme").onclick = nextTheme;
    $("help-open").onclick = keys["?"];
    $("query").oninput = (event) => find(event.target.value);
    $("search").onsubmit = (event) => { event.preventDefault(); nextHit(state.token === marks.starts[state.hit] ? 1 : 0); };
    $("query").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.shiftKey) { event.preventDefault(); nextHit(-1); }
    });
    const map = $("map");
    map.addEventListener("keydown", onMapKey);
    map.addEventListener("click", (event) => { const cell = mapCell(data, map, event); if (cell) update(cell); });
    map.addEventListener("mousemove", (event) => {
      const cell = mapCell(data, map, event);
      $("map-cell").textContent = cell ? describeCell(data, state, cell.layer, cell.expert) : "";
    });
    map.addEventListener("mouseleave", showLoad);
    new ResizeObserver(() => drawMap(data, state)).observe(map.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  }

  function build() {
    $("title").textContent = data.title;
    const experts = Array.from(new Set(data.experts)).join(" or "), topK = Array.from(new Set(data.traces.map((trace) => trace.topK))).join(" or ");
    const size = data.tokens < data.total ? "tokens " + grouped(data.first) + " to " + grouped(data.first + data.tokens - 1) + " of " + grouped(data.total) : plural(data.tokens, "token");
    const origin = two ? data.traces.map((trace, index) => "AB"[index] + " · " + [trace.name, ...trace.facts].join(", ")).join("; ") : data.traces[0].facts.join(", ");
    $("facts").textContent = [size, plural(layerCount, "MoE layer"), experts + " experts, top-" + topK, origin].filter(Boolean).join(" · ");
    $("layer").max = layerCount - 1;
    const largestK = Math.max(...data.traces.map((trace) => trace.topK)), ends = ["1st", "2nd", "3rd"];
    for (let k = 0; k < largestK; k++) $("slot").append(element("option", { value: k }, (ends[k] || k + 1 + "th") + " choice"));
    $("slot").parentElement.hidden = largestK < 2;
    for (const node of document.querySelectorAll("[data-two]")) node.hidden = !two;
    if (!two) return;
    $("views").hidden = false;
    data.traces.forEach((trace, view) => $("views").append(element("button", { type: "button", onclick: () => update({ view }) }, "AB"[view] + " · " + trace.name)));
    $("map").before(element("div", { class: "row" }, element("button", { type: "button", id: "change", "aria-pressed": "false", onclick: () => update({ change: !state.change }) }, "B less A")));
  }

  build();
  listen();
  update(recall());
  applyTheme();
  document.documentElement.dataset.ready = "";
}

readData().then(start).catch((error) => {
  document.querySelector("main").replaceChildren(element("p", { class: "problem", role: "alert" },
    "This page cannot be shown: " + error.message + ". It needs a browser of 2023 or later."));
  throw error;
});
