// A small SVG plot: axes, a band, lines, a marker. Redrawn whole at every change; nothing is kept.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 52, right: 14, top: 30, bottom: 40 };
const HEIGHT = 262;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Four digits, exponents as powers of ten written out
function digits(x, count = 4) {
  if (Number.isNaN(x)) return "none";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-4 ? x.toExponential(count - 2) : String(Number(x.toPrecision(count)));
  return text.replace("-", "−").replace("e−", "e-").replace("e+", "e");
}

const SCALES = {
  linear: { to: (x) => x, from: (x) => x },
  log: { to: (x) => Math.log10(x), from: (x) => 10 ** x },
  // linear around 0, logarithmic beyond 0.01: small penalties stay visible beside a policy term of size 1
  signed: { to: (x) => Math.asinh(x / 0.02), from: (x) => 0.02 * Math.sinh(x) },
};

function ticks(axis) {
  const { scale, low, high } = axis;
  if (scale === "log") {
    const found = [];
    for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++) found.push(10 ** e);
    return found.map((x) => [x, x >= 0.001 ? digits(x) : `1e${Math.round(Math.log10(x))}`]);
  }
  if (scale === "signed") {
    const found = [0];
    for (let e = -1; e <= 4; e++) found.push(10 ** e, -(10 ** e));
    if (Math.max(high, -low) < 0.2) found.push(0.01, -0.01);
    return found.filter((x) => x >= low && x <= high).map((x) => [x, digits(x)]);
  }
  const raw = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found.map((x) => [x, digits(Math.abs(x) < 1e-9 * step ? 0 : x)]);
}

// Maps between values and pixels of one plot
function frame(width, x, y) {
  const inner = width - MARGIN.left - MARGIN.right, tall = HEIGHT - MARGIN.top - MARGIN.bottom;
  const along = (axis, value) => {
    const { to } = SCALES[axis.scale];
    return (to(value) - to(axis.low)) / (to(axis.high) - to(axis.low));
  };
  return {
    left: (value) => MARGIN.left + inner * along(x, value),
    top: (value) => MARGIN.top + tall * (1 - along(y, value)),
    xAt: (pixel) => {
      const { to, from } = SCALES[x.scale];
      const share = Math.min(1, Math.max(0, (pixel - MARGIN.left) / inner));
      return from(to(x.low) + share * (to(x.high) - to(x.low)));
    },
    inner, tall,
  };
}

function drawAxes(svg, view, x, y) {
  const floor = MARGIN.top + view.tall;
  for (const [value, label] of ticks(x)) {
    const at = view.left(value);
    svg.append(element("line", { x1: at, x2: at, y1: MARGIN.top, y2: floor, class: "grid" }));
    svg.append(element("text", { x: at, y: floor + 16, "text-anchor": "middle" }, label));
  }
  for (const [value, label] of ticks(y)) {
    const at = view.top(value);
    const across = { x1: MARGIN.left, x2: MARGIN.left + view.inner, y1: at, y2: at };
    svg.append(element("line", { ...across, class: value === 0 ? "zero" : "grid" }));
    svg.append(element("text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, label));
  }
  const middle = MARGIN.left + view.inner / 2;
  svg.append(element("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle", class: "name" }, x.name));
}

// Vertical lines with a name; names that would meet are put in rows
function drawRules(svg, view, x, rules) {
  let row = 0, last = -Infinity;
  for (const { at, name, cls } of [...rules].sort((one, other) => one.at - other.at)) {
    if (!(at >= x.low && at <= x.high)) continue;
    const left = view.left(at);
    row = left - last < 30 ? row + 1 : 0;  // two rows above the plot; a third name goes inside it
    last = left;
    const down = { x1: left, x2: left, y1: MARGIN.top, y2: MARGIN.top + view.tall };
    svg.append(element("line", { ...down, class: `rule ${cls}` }));
    const place = { x: left, y: row < 2 ? MARGIN.top - 4 - 13 * row : MARGIN.top + 12, "text-anchor": "middle" };
    svg.append(element("text", { ...place, class: `rule-name ${cls}` }, name));
  }
}

function drawLine(svg, view, x, y, line) {
  const { to, from } = SCALES[x.scale];
  const count = 320;
  let path = "", pen = "M", before = NaN;
  const xs = [...Array(count + 1).keys()].map((i) => from(to(x.low) + ((to(x.high) - to(x.low)) * i) / count));
  for (const at of [...xs, ...(line.also ?? [])].sort((one, other) => one - other)) {
    const value = line.fn(at);
    if (!Number.isFinite(value)) { pen = "M"; continue; }
    if ((line.breaks ?? []).some((x) => before < x && x <= at)) pen = "M";
    before = at;
    const clear = 4 * (y.high - y.low) || 1;  // keep coordinates finite; the clip path hides what is outside
    const held = Math.min(y.high + clear, Math.max(y.low - clear, value));
    path += `${pen}${view.left(at).toFixed(2)} ${view.top(held).toFixed(2)}`;
    pen = "L";
  }
  svg.append(element("path", { d: path, class: `line ${line.cls}` }));
}

let plots = 0;

// plot: {host, label, x, y, lines: [{fn, cls, also, breaks, quiet}], bands: [[low, high, cls]], rules, levels, marker,
// pick}; `also` are places to evaluate exactly, at `breaks` the pen is lifted, a `quiet` line has no dot.
function draw(plot) {
  const { host, x, y } = plot;
  const width = host.clientWidth;
  if (width < 60) return;
  const view = frame(width, x, y);
  const size = { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}` };
  const svg = element("svg", { ...size, role: "img", "aria-label": plot.label });
  const clip = `plot-${plots++}`;
  const box = { x: MARGIN.left, y: MARGIN.top, width: view.inner, height: view.tall };
  const shape = element("clipPath", { id: clip });
  shape.append(element("rect", box));
  svg.append(shape);
  for (const [low, high, cls] of plot.bands ?? []) {
    const [from, to] = [low, high].map((end) => view.left(Math.max(x.low, Math.min(x.high, end))));
    if (to > from) svg.append(element("rect", { ...box, x: from, width: to - from, class: cls }));
  }
  drawAxes(svg, view, x, y);
  const inside = element("g", { "clip-path": `url(#${clip})` });
  for (const level of plot.levels ?? []) {
    const at = view.top(level);
    inside.append(element("line", { x1: MARGIN.left, x2: MARGIN.left + view.inner, y1: at, y2: at, class: "level" }));
  }
  for (const line of plot.lines) drawLine(inside, view, x, y, line);
  svg.append(inside);
  drawRules(svg, view, x, plot.rules ?? []);
  if (plot.marker >= x.low && plot.marker <= x.high) {
    const cx = view.left(plot.marker);
    for (const line of plot.lines) {
      const value = line.fn(plot.marker);
      if (!line.quiet && value >= y.low && value <= y.high)
        svg.append(element("circle", { cx, cy: view.top(value), r: 4.5, class: `dot ${line.cls}` }));
    }
  }
  host.replaceChildren(svg);
  const pick = (event) => plot.pick(view.xAt(event.clientX - host.getBoundingClientRect().left));
  host.onpointerdown = (event) => {
    host.setPointerCapture(event.pointerId);
    pick(event);
  };
  host.onpointermove = (event) => { if (event.buttons) pick(event); };
}
