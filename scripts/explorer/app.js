// The page: controls <-> state <-> URL hash, and the panels drawn from the state.

const TABLE = JSON.parse(document.getElementById("table").textContent);
const ENDS = JSON.parse(document.getElementById("ends").textContent);
const $ = (id) => document.getElementById(id);
const logit = (p) => Math.log(p / (1 - p)), expit = (s) => 1 / (1 + Math.exp(-s));
const LOG10 = { to: Math.log10, from: (s) => 10 ** s };
const LOGIT = { to: logit, from: expit };
const PLAIN = { to: (x) => x, from: (x) => x };

const SLIDERS = {
  option: { ...PLAIN, key: "o" }, radius: { ...LOG10, key: "r" }, coefficient: { ...LOG10, key: "c" },
  b: { ...LOGIT, key: "b" }, q: { ...LOGIT, key: "q" }, p: { ...LOGIT, key: "p" },
};
const START = {
  d: "reverse_kl", role: "both", e: "sampled", a: "1", o: 0.5, r: 0.03, c: 0.04, b: 0.3, q: 0.2, p: 0.36,
};
const state = { ...START };

const entry = () => TABLE.find((line) => line.name === state.d);
const regulariser = () => entry().divergence && state.role !== "region";
const region = () => state.role !== "regulariser" || !entry().divergence;
const option = () => (entry().options.length ? state.o : undefined);

// The region in force: the divergence's own, or GRPO's clip range where the divergence only regularises.
function limits() {
  if (!region() || !entry().region) return bounds("ratio", 0.2, state.b);
  return bounds(state.d, state.r, state.b, option());
}

// What multiplies grad log p_y in one ascent step on the sampled token
function policyWeight(p, advantage, [low, high]) {
  const w = p / state.b;
  return (w < low && advantage < 0) || (w > high && advantage > 0) ? 0 : advantage * w;
}
const sampledWeight = (p) => -sampled(state.d, p, state.q, option())[1];
const scoreWeight = (p) => (-p / state.b) * score(state.d, p, state.q, option());
const penaltyWeight = (p) => state.c * (state.e === "sampled" ? sampledWeight(p) : scoreWeight(p));
function penaltyValue(p) {
  if (state.e === "weighted") return (state.c * term(state.d, p, state.q, option())) / state.b;
  return state.c * sampled(state.d, p, state.q, option())[0];
}

// ---- axes

function probabilityAxis() {
  const smallest = Math.max(1e-9, Math.min(state.b, state.q, state.p) / 12);
  const low = 10 ** Math.floor(Math.log10(smallest));
  return { scale: "log", low, high: 1, name: "p_y, the trained policy's probability of the token" };
}

// Limits that show the bulk of some curves; what grows without bound near p = 0 leaves the panel.
function bulk(fns, x, extra = []) {
  const values = [];
  for (let i = 0; i <= 200; i++) {
    const at = x.low * (x.high / x.low) ** (i / 200);
    for (const fn of fns) values.push(fn(at));
  }
  const finite = values.filter(Number.isFinite).sort((one, other) => one - other);
  const at = (share) => finite[Math.round(share * (finite.length - 1))] ?? 0;
  let low = Math.min(0, at(0.1), ...extra), high = Math.max(0, at(0.9), ...extra);
  if (!(high - low > 1e-12)) { low -= 1; high += 1; }
  const pad = 0.12 * (high - low);
  return { scale: "linear", low: low - (low < 0 ? pad : 0), high: high + (high > 0 ? pad : 0) };
}

// ---- panels

const rules = (names) => names.map((name) => ({ at: state[name], name: `${name}_y`, cls: `at-${name}` }));
const setP = (p) => { state.p = Math.min(0.9999, Math.max(1e-6, p)); show(); };

function surrogatePanel(low, high) {
  const far = Math.max(Number.isFinite(high) ? 1.25 * high : 4, (1.1 * state.p) / state.b);
  const top = Math.min(20, Math.max(2, far));
  const x = { scale: "linear", low: 0, high: top, name: "w = p_y / b_y" };
  const y = { scale: "linear", low: -top, high: top };
  const clipped = (advantage) => (w) => Math.min(w * advantage, Math.min(Math.max(w, low), high) * advantage);
  const also = [low, high].filter((w) => w > 0 && w < top);
  const lines = [
    { fn: (w) => w, cls: "faint", quiet: true }, { fn: (w) => -w, cls: "faint", quiet: true },
    { fn: clipped(1), cls: state.a === "1" ? "c0" : "c0 pale", also, quiet: state.a !== "1" },
    { fn: clipped(-1), cls: state.a === "1" ? "c1 pale" : "c1", also, quiet: state.a === "1" },
  ];
  draw({
    host: $("plot-surrogate"), x, y, lines, marker: state.p / state.b, label: $("numbers").innerText,
    bands: [[Math.max(0, low), high, "inside"], [1 / state.b, Infinity, "impossible"]],
    rules: [{ at: state.p / state.b, name: "w", cls: "at-p" }], pick: (w) => setP(w * state.b),
  });
}

function constraintPanel(x, low, high) {
  const fn = (p) => constraintAt(state.d, Math.log(p / state.b), state.b, option());
  const y = { scale: "linear", low: 0, high: 3 * state.r };
  const also = [low, 1, high].map((w) => w * state.b).filter((p) => p > x.low && p < 1);
  draw({
    host: $("plot-constraint"), x, y, lines: [{ fn, cls: "c2", also }], levels: [state.r], marker: state.p, pick: setP,
    bands: [[Math.max(0, low) * state.b, Math.min(1, high * state.b), "inside"]], rules: rules(["b", "p"]),
    label: `Constraint of ${state.d} against the policy's probability, radius ${digits(state.r)}`,
  });
  $("now-constraint").textContent = `at p_y: ${digits(fn(state.p))}`;
}

function penaltyPanel(x) {
  const whole = (p) => state.c * term(state.d, p, state.q, option());
  const y = bulk([penaltyValue, whole], x);
  const also = [state.q];
  const lines = [{ fn: whole, cls: "c3 dashed", also }, { fn: penaltyValue, cls: "c1", also }];
  draw({
    host: $("plot-penalty"), x, y, lines, marker: state.p, pick: setP, rules: rules(["q", "p"]),
    label: `Penalty of ${state.d} against the policy's probability`,
  });
  $("now-penalty").textContent = digits(penaltyValue(state.p));
  $("now-term").textContent = digits(whole(state.p));
}

function weightsPanel(x, limit) {
  const advantage = Number(state.a), pulls = regulariser();
  const policy = (p) => policyWeight(p, advantage, limit);
  const penalty = (p) => (pulls ? penaltyWeight(p) : 0);
  const total = (p) => policy(p) + penalty(p);
  const fns = pulls ? [policy, penalty, total] : [policy];
  const edge = state.b * (advantage > 0 ? limit[1] : limit[0]);
  const peak = advantage * Math.min(1 / state.b, advantage > 0 ? limit[1] : Infinity, 100);
  const shown = [-1, 1, Number.isFinite(peak) ? peak : 0, ...fns.map((fn) => fn(state.p))];
  const y = { ...bulk(fns, x, shown), scale: "signed" };
  const also = [edge * (1 - 1e-9), edge, edge * (1 + 1e-9), state.q].filter((p) => p > x.low && p < 1);
  const breaks = [advantage > 0 ? edge * (1 + 1e-9) : edge];
  const lines = [{ fn: policy, cls: "c0", also, breaks }];
  if (pulls) lines.push({ fn: penalty, cls: "c1", also }, { fn: total, cls: "ink dashed", also, breaks });
  draw({
    host: $("plot-weights"), x, y, lines, marker: state.p, pick: setP,
    rules: rules(pulls ? ["b", "q", "p"] : ["b", "p"]),
    label: "What multiplies the gradient of log p: policy term, penalty and their sum",
  });
  $("now-policy").textContent = digits(policy(state.p));
  $("now-pull").textContent = digits(penalty(state.p));
  $("now-total").textContent = digits(total(state.p));
}

function estimatorsPanel(x) {
  const y = bulk([sampledWeight, scoreWeight], x);
  const also = [state.q];
  const lines = [{ fn: sampledWeight, cls: "c1", also }, { fn: scoreWeight, cls: "c4", also }];
  draw({
    host: $("plot-estimators"), x, y, lines, marker: state.p, pick: setP, rules: rules(["q", "p"]),
    label: "The same divergence as sampled and as score or weighted: what multiplies the gradient of log p",
  });
  $("now-sampled").textContent = digits(sampledWeight(state.p));
  $("now-score").textContent = digits(scoreWeight(state.p));
}

// Where training ends on the bandit of docs/fixed_points.md, at the option that the page has; the sliders change nothing.
function endsPanel() {
  const end = ENDS.ends[state.d], host = $("plot-ends");
  const width = Math.max(host.clientWidth, 240), gap = (width - 70) / ENDS.rewards.length, bar = gap / 4;
  const tall = HEIGHT - MARGIN.bottom - 12;
  const options = Object.entries(ENDS.options[state.d] ?? {}).map(([name, value]) => `, ${name} ${value}`).join("");
  const arms = (policy) => policy.map((x) => digits(x, 3)).join(", ");
  const said = `Optimum ${arms(end.optimum)}; sampled ends at ${arms(end.sampled.policy)}`;
  const svg = element("svg", { width, height: HEIGHT, role: "img", "aria-label": said });
  for (const level of [0, 0.5, 1]) {
    const y = 12 + tall * (1 - level);
    svg.append(element("line", { x1: MARGIN.left, x2: width - 14, y1: y, y2: y, class: level ? "grid" : "zero" }));
    svg.append(element("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, digits(level)));
  }
  ENDS.rewards.forEach((reward, arm) => {
    const left = MARGIN.left + gap * (arm + 0.125);
    [[ENDS.reference, "c3"], [end.optimum, "c4"], [end.sampled.policy, "c1"]].forEach(([policy, cls], i) => {
      const height = tall * policy[arm];
      const box = { x: left + i * bar, y: 12 + tall - height, width: bar - 1, height, class: `bar ${cls}` };
      svg.append(element("rect", box));
    });
    const middle = { x: left + 1.5 * bar, y: HEIGHT - MARGIN.bottom + 16, "text-anchor": "middle" };
    svg.append(element("text", middle, digits(reward)));
  });
  const name = { x: MARGIN.left + (width - 66) / 2, y: HEIGHT - 6, "text-anchor": "middle", class: "name" };
  svg.append(element("text", name, "reward of the arm"));
  host.replaceChildren(svg);
  const words = end.sampled.known.replaceAll("`", ""), far = digits(end.sampled.distance, 3);
  $("now-ends").textContent = `coefficient ${digits(end.coefficient)}${options}; sampled ends at ${words}` +
    (end.sampled.distance > 1e-6 ? `, ${far} from the optimum` : "");
}

// ---- words and numbers

function numbers(low, high) {
  const w = state.p / state.b, own = region() && entry().region;
  $("low").textContent = low > 0 ? low.toFixed(5) : "no lower bound";
  $("high").textContent = Number.isFinite(high) ? high.toFixed(5) : "no upper bound";
  $("reach").textContent = `${low > 0 ? digits(low * state.b) : "0"} to ${digits(Math.min(1, high * state.b))}`;
  $("ratio").textContent = digits(w);
  const where = w < low ? "below the region" : w > high ? "above the region" : "inside the region";
  const stopped = policyWeight(state.p, Number(state.a), [low, high]) === 0;
  const kept = where === "inside the region" ? where : `${where}, but the advantage pushes back: the gradient stays`;
  $("verdict").textContent = stopped ? `${where}: no policy gradient` : kept;
  const size = `${state.d === "ratio" ? "epsilon" : "radius"} ${digits(state.r)}`;
  $("region-name").textContent = own ? `${state.d}, ${size}` : "ratio, epsilon 0.2 (the default of GRPO)";
  $("formula").textContent = entry().formula;
  $("source").textContent = entry().source;
  $("no-region").hidden = !(region() && !entry().region);
}

function visibility() {
  const own = region() && entry().region;
  const shown = {
    "panel-constraint": own, "row-radius": own,
    "row-option": entry().options.length > 0, "row-role": entry().divergence,
  };
  const panels = ["panel-penalty", "panel-estimators", "key-pull", "key-total"];
  for (const id of [...panels, "row-q", "row-coefficient", "row-estimator"]) shown[id] = regulariser();
  shown["panel-ends"] = regulariser() && state.d in ENDS.ends;
  for (const [id, visible] of Object.entries(shown)) $(id).hidden = !visible;
  const figures = [...document.querySelectorAll("#panels > figure")].filter((figure) => !figure.hidden);
  figures.forEach((figure, i) => figure.classList.toggle("span", figures.length % 2 === 1 && i === figures.length - 1));
}

function fillControls() {
  $("divergence").value = state.d;
  $("estimator").value = state.e;
  for (const name of ["role", "a"])
    document.querySelector(`input[name=${name}][value="${state[name]}"]`).checked = true;
  const [low, high] = state.d === "beta" ? [-2, 4] : [-4, 4];
  Object.assign($("option"), { min: low, max: high });
  $("option-name").textContent = entry().options[0] ?? "option";
  $("radius-name").textContent = state.d === "ratio" ? "epsilon" : "radius";
  for (const [id, slider] of Object.entries(SLIDERS)) {
    const text = digits(state[slider.key]);
    if (document.activeElement !== $(id)) $(id).value = slider.to(state[slider.key]);
    $(id).setAttribute("aria-valuetext", text);
    $(`${id}-out`).textContent = text;
  }
}

let pending = 0;
function show() {
  if (state.d === "beta") state.o = Math.max(-2, state.o);
  visibility();
  fillControls();
  const [low, high] = limits();
  numbers(low, high);
  const x = probabilityAxis();
  surrogatePanel(low, high);
  if (region() && entry().region) constraintPanel(x, low, high);
  weightsPanel(x, [low, high]);
  if (regulariser()) { penaltyPanel(x); estimatorsPanel(x); }
  if (regulariser() && state.d in ENDS.ends) endsPanel();
  clearTimeout(pending);
  pending = setTimeout(() => history.replaceState(null, "", `#${hash()}`), 300);
}

// ---- state in the address

const short = (x) => (typeof x === "number" ? Number(x.toPrecision(6)) : x);
const hash = () => Object.keys(START).map((key) => `${key}=${short(state[key])}`).join("&");

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const legal = {
    d: TABLE.map((line) => line.name), a: ["1", "-1"],
    role: ["regulariser", "region", "both"], e: ["sampled", "weighted", "score"],
  };
  Object.assign(state, START);
  for (const [key, names] of Object.entries(legal)) if (names.includes(given.get(key))) state[key] = given.get(key);
  for (const [id, { key, from }] of Object.entries(SLIDERS)) {
    const value = parseFloat(given.get(key));
    if (Number.isNaN(value)) continue;
    const slider = $(id);
    state[key] = Math.min(from(Number(slider.max)), Math.max(from(Number(slider.min)), value));
  }
}

function listen() {
  $("divergence").addEventListener("change", (event) => {
    state.d = event.target.value;
    if (state.d === "ratio" && state.r < 0.05) state.r = 0.2;
    show();
  });
  $("estimator").addEventListener("change", (event) => { state.e = event.target.value; show(); });
  for (const name of ["role", "a"])
    for (const input of document.querySelectorAll(`input[name=${name}]`))
      input.addEventListener("change", () => { state[name] = input.value; show(); });
  for (const [id, { key, from }] of Object.entries(SLIDERS))
    $(id).addEventListener("input", (event) => { state[key] = from(Number(event.target.value)); show(); });
  window.addEventListener("hashchange", () => { readHash(); show(); });
  new ResizeObserver(show).observe($("panels"));
}

for (const family of new Set(TABLE.map((line) => line.family))) {
  const group = document.createElement("optgroup");
  group.label = family;
  const members = TABLE.filter((line) => line.family === family);
  group.append(...members.map((line) => new Option(line.name, line.name)));
  $("divergence").append(group);
}
readHash();
listen();
show();
