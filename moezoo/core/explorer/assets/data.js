// The page's data: columns of one or two traces, and what is counted from them.
// L layers, K experts per token, N tokens; a column of [L, K, N] has the value of l, k, n at (l K + k) N + n.

async function readData() {
  const text = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = new DataView(whole.buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(whole.subarray(4, 4 + length)));
  let start = 4 + length;
  for (const column of data.columns) {
    const end = start + column.bytes * column.size;
    (column.trace === null ? data : data.traces[column.trace])[column.name] = values(column, whole.subarray(start, end));
    start = end;
  }
  data.traces.forEach((trace) => { trace.layers = data.layers.map((_, layer) => layerCounts(data, trace, layer)); });
  return data;
}

// Numbers of a column, whose bytes are in planes: integers with -1 for a missing one, or reals with NaN.
function values(column, bytes) {
  const top = 2 ** (8 * column.bytes) - 1, real = column.power !== null;
  const found = new (real ? Float32Array : Int32Array)(column.size);
  for (let i = 0; i < column.size; i++) {
    let code = 0;
    for (let plane = column.bytes - 1; plane >= 0; plane--) code = code * 256 + bytes[plane * column.size + i];
    if (code === top) found[i] = real ? NaN : -1;
    else found[i] = real ? column.low + (column.high - column.low) * (code / (top - 1)) ** column.power : code;
  }
  return found;
}

// Load of a layer's experts, its experts by falling load, and its largest weight.
function layerCounts(data, trace, layer) {
  const count = new Int32Array(data.experts[layer]), size = trace.topK * data.tokens, start = layer * size;
  let total = 0, largest = 0;
  for (let i = start; i < start + size; i++) {
    if (trace.expert[i] < 0) continue;
    count[trace.expert[i]]++;
    total++;
    if (trace.weight && trace.weight[i] > largest) largest = trace.weight[i];
  }
  const order = Array.from(count.keys()).sort((a, b) => count[b] - count[a] || a - b);
  return { count, total, order, largest: largest || 1 };
}

// Share of a layer's assignments that an expert gets, times the number of experts: 1 is an even load.
function relativeLoad(data, trace, layer, expert) {
  const { count, total } = trace.layers[layer];
  return total && expert < count.length ? (count[expert] / total) * data.experts[layer] : 0;
}

// The choices of a token in a layer: [{expert, weight, dropped}], by falling weight. Weight is null if unknown.
function choices(data, trace, layer, token) {
  const found = [];
  for (let k = 0; k < trace.topK; k++) {
    const i = (layer * trace.topK + k) * data.tokens + token;
    if (trace.expert[i] < 0) continue;
    found.push({
      expert: trace.expert[i],
      weight: trace.weight ? trace.weight[i] : null,
      dropped: Boolean(trace.dropped && trace.dropped[i]),
    });
  }
  return found;
}

// Whether the two traces send a token to different sets of experts.
function differs(data, layer, token) {
  const [first, second] = data.traces.map((trace) => choices(data, trace, layer, token).map((choice) => choice.expert));
  return first.length !== second.length || first.some((expert) => !second.includes(expert));
}

// Tokens that differ, by layer: arrays of positions.
function differences(data) {
  return data.layers.map((_, layer) => {
    const found = [];
    for (let token = 0; token < data.tokens; token++) if (differs(data, layer, token)) found.push(token);
    return found;
  });
}

// The tokens that chose an expert: [{token, weight}], by falling weight.
function tokensOf(data, trace, layer, expert) {
  const found = [], N = data.tokens;
  for (let k = 0; k < trace.topK; k++) {
    const start = (layer * trace.topK + k) * N;
    for (let token = 0; token < N; token++) {
      if (trace.expert[start + token] !== expert) continue;
      found.push({ token, weight: trace.weight ? trace.weight[start + token] : null });
    }
  }
  return found.sort((a, b) => b.weight - a.weight || a.token - b.token);
}

// Texts that an expert takes most often: [{text, taken, of}] of texts that it takes twice or more.
function favoriteTexts(data, found) {
  const occurs = new Map(), taken = new Map();
  for (const text of data.text) occurs.set(text, (occurs.get(text) || 0) + 1);
  for (const { token } of found) taken.set(data.text[token], (taken.get(data.text[token]) || 0) + 1);
  return Array.from(taken, ([text, count]) => ({ text: data.texts[text], taken: count, of: occurs.get(text) }))
    .filter((entry) => entry.taken > 1)
    .sort((a, b) => b.taken / (b.of + 2) - a.taken / (a.of + 2) || b.taken - a.taken);
}

// Share of each domain's tokens that chose an expert.
function domainShares(data, found) {
  const size = new Int32Array(data.domains.length), taken = new Int32Array(data.domains.length);
  const domainOf = (token) => (data.domain ? data.domain[token] : 0);
  for (let token = 0; token < data.tokens; token++) size[domainOf(token)]++;
  for (const { token } of found) taken[domainOf(token)]++;
  return data.domains
    .map((name, domain) => ({ name, share: taken[domain] / size[domain], taken: taken[domain], size: size[domain] }))
    .filter((entry) => entry.size);
}

// Numbers as people read them.
function number(value, digits) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const value = share * 100;
  if (value !== 0 && Math.abs(value) < 0.01) return value.toPrecision(1) + " %";
  return value.toFixed(value === 0 || Math.abs(value) >= 9.95 ? 0 : Math.abs(value) >= 0.95 ? 1 : 2) + " %";
}

function plural(count, word) {
  return grouped(count) + " " + word + (count === 1 ? "" : "s");
}

function grouped(value) {
  return value.toLocaleString("en-US");
}
