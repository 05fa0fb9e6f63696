"use strict";
// The formulas of mirrorpo in JavaScript: divergences/, solver.py and trust_region.py, in float64.
// tests/docs/test_explorer.py holds every function here against the Python one.

const EDGE = 700;        // LOG_PROB_FLOOR and LOG_RATIO_LIMIT
const MAX_WEIGHT = 80;   // MAX_LOG_WEIGHT
const hold = (x, bound) => Math.min(bound, Math.max(-bound, x));

// e^u - 1 - u
const k = (u) => Math.max(0, Math.expm1(u) - u);

// exp(shift * delta + offset) * B_a(delta), the power gap of divergences/power.py
function powerGap(a, delta, shift, offset = 0) {
  if (a > 0.5) return powerGap(1 - a, -delta, -(shift + 1), offset);
  let gap = k(delta);
  if (a !== 0) gap = Math.max(0, (k(a * delta) / a - gap) / (a - 1));
  return gap * Math.exp(shift * delta + offset);
}
const powerSlope = (a, delta) => (a === 1 ? delta : Math.expm1((a - 1) * delta) / (a - 1));

// Bregman: (log x, log z, log x/z) -> [d, x * dd/dx]
const COORDINATES = {
  kl: (lx, lz, delta) => [Math.exp(lx) * k(-delta), Math.exp(lx) * delta],
  prob_l2: (lx, lz) => {
    const gap = Math.exp(lx) - Math.exp(lz);
    return [gap * gap, 2 * Math.exp(lx) * gap];
  },
  itakura_saito: (lx, lz, delta) => [k(delta), Math.expm1(delta)],
  beta: (lx, lz, delta, beta) => [
    powerGap(beta, delta, 0, beta * lz),
    Math.exp(delta + beta * lz) * powerSlope(beta, delta),
  ],
};

// functions of the log-ratio: delta -> [S, dS/ddelta, g = S + dS/ddelta]
const FORMS = {
  reverse_kl: (delta) => [k(-delta), -Math.expm1(-delta), delta],
  forward_kl: (delta) => {
    const e = Math.expm1(-delta);
    return [Math.max(0, -e - delta * (e + 1)), delta * (e + 1), -e];
  },
  jeffreys: (delta) => {
    const e = Math.expm1(-delta);
    return [-delta * e, delta * (e + 1) - e, delta - e];
  },
  js: (delta) => {
    const e = Math.expm1(-delta);
    const logMix = Math.log1p(0.5 * e);
    const rest = 0.5 * (logMix + delta) * (e + 1);
    return [Math.max(0, -0.5 * logMix - rest), rest, -0.5 * logMix];
  },
  tv: (delta) => {
    const e = Math.expm1(-delta), half = 0.5 * Math.sign(delta);
    return [0.5 * Math.abs(e), half * (e + 1), half];
  },
  chi2: (delta) => {
    const up = Math.expm1(delta), down = Math.expm1(-delta);
    return [-up * down, up - down, 2 * up];
  },
  hellinger: (delta) => {
    const e = Math.expm1(-0.5 * delta);
    return [0.5 * e * e, -0.5 * e * (e + 1), -0.5 * e];
  },
  alpha: (delta, alpha) => {
    const value = powerGap(alpha, delta, -1), slope = powerSlope(alpha, delta);
    return [value, slope - value, slope];
  },
  k1: (delta) => [delta, 1, 1 + delta],
  k2: (delta) => [0.5 * delta * delta, delta, delta * (1 + 0.5 * delta)],
  log_l2: (delta) => [delta * delta, 2 * delta, delta * (2 + delta)],
};
FORMS.k3 = FORMS.reverse_kl;
const PENALTIES = ["k2", "log_l2"];
const ALIASES = { kl3: "forward_kl", kl2: "k2" };

function growth(name, option) {
  if (name === "chi2") return 2;
  if (name === "alpha") return Math.max(1, Math.abs(option), Math.abs(option - 1));
  if (name === "beta") return Math.max(1, Math.abs(option - 1), option <= 0.5 ? Math.abs(option) : 0);
  return 1;
}

// Where `sampled` and `weighted` hold the log-ratio so that float32 does not overflow.
function heldAt(name, option) {
  if (name in FORMS) return MAX_WEIGHT / growth(name, option);
  if (name === "itakura_saito") return MAX_WEIGHT;
  if (name !== "beta") return EDGE;
  const unbounded = Math.max(1 - option, -option);
  return Math.min(unbounded > 0.12 ? MAX_WEIGHT / unbounded : EDGE, EDGE / growth(name, option));
}

const isDivergence = (name) => name in FORMS || name in COORDINATES;

function coordinate(name, logx, logz, bound, option) {
  const delta = hold(logx - logz, bound);
  if (name in COORDINATES) return COORDINATES[name](logx, logz, delta, option);
  const [value, , weight] = FORMS[name](delta, option);
  return [Math.exp(logx) * value, Math.exp(logx) * weight];
}

// d(p, q): what `exact` sums over the vocabulary
function term(name, p, q, option) {
  if (!isDivergence(name)) return NaN;
  return coordinate(name, Math.log(p), Math.log(q), EDGE / growth(name, option), option)[0];
}

// g: E_{y ~ p}[g grad log p_y] = grad D
function score(name, p, q, option) {
  if (!isDivergence(name)) return NaN;
  return coordinate(name, Math.log(p), Math.log(q), heldAt(name, option), option)[1] / p;
}

// The `sampled` estimator at the sampled token: [value, what multiplies grad log p]
function sampled(name, p, q, option) {
  if (!isDivergence(name)) return [NaN, NaN];
  const delta = hold(Math.log(p) - Math.log(q), heldAt(name, option));
  if (name in COORDINATES) return COORDINATES[name](Math.log(p), Math.log(q), delta, option);
  return FORMS[name](delta, option).slice(0, 2);
}

function binaryKl(s, logb) {
  const b = Math.exp(logb), rest = -Math.expm1(logb);
  const share = Math.min(1, (b * Math.expm1(s)) / Math.max(rest, 1e-300));
  const nearOne = () => Math.log(-Math.expm1(Math.min(0, logb + s))) - Math.log(Math.max(rest, 1e-300));
  return b * k(s) + rest * k(share > 0.5 ? nearOne() : Math.log1p(-share));
}

// What the trust region compares with its radius at the sampled token, s = log w; 0 at s = 0
function constraintAt(region, s, b, option) {
  const name = ALIASES[region] ?? region, logb = Math.log(b);
  if (name === "ratio") return Math.abs(Math.expm1(s));
  if (name === "binary_tv") return Math.abs(b * Math.expm1(s));
  if (name === "binary_kl") return binaryKl(s, logb);
  if (name === "k1" || !isDivergence(name)) return NaN;
  if (PENALTIES.includes(name)) return FORMS[name](s, option)[0];
  if (name in FORMS) return Math.exp(s) * FORMS[name](s, option)[0];
  return coordinate(name, logb + s, logb, EDGE / growth(name, option), option)[0];
}

function solveSide(constraint, radius, end, unbounded) {
  if (!(constraint(end) >= radius)) return unbounded;
  let inside = 0, outside = end;
  for (let halving = 0; halving < 60; halving++) {
    const middle = 0.5 * (inside + outside);
    if (constraint(middle) < radius) inside = middle;
    else outside = middle;
  }
  return 0.5 * (inside + outside);
}

// [low, high] of the ratio w; low <= 0: no lower bound, high Infinity: no upper bound. Of `ratio`, radius is epsilon.
function bounds(region, radius, b, option) {
  const name = ALIASES[region] ?? region;
  if (name === "ratio") return [1 - radius, 1 + (option ?? radius)];
  if (name === "binary_tv") return [1 - radius / b, 1 + radius / b];
  if (name === "k1") return [NaN, NaN];
  const fixed = name in FORMS;
  const end = fixed ? EDGE / growth(name, option) : EDGE;
  const constraint = (s) => constraintAt(name, s, b, option);
  const low = solveSide(constraint, radius, -end, -Infinity);
  const high = solveSide(constraint, radius, fixed ? end : -Math.log(b), Infinity);
  return [Math.exp(low), Math.exp(high)];
}

window.mirrorpo = { bounds, term, score, sampled, constraintAt };
