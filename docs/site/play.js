// docs/play.md: the gradient's field in two dimensions, as in experiments/gradients.py, with sliders.
// A test compares the two. Noise levels t: x_t = (1 - t) x0 + t noise.
"use strict";

// ---------------------------------------------------------------------------------------------- formulas

const TWO = { means: [[-1.2, 0], [1.2, 0]], spread: [0.35, 0.35] };
const THREE = { means: [[-1, -0.6], [1, -0.6], [0, 1.1]], spread: [0.4, 0.4] };
const ANY = [1, 1, 1], UPPER = [1e-9, 1e-9, 1];  // shares of the modes under a prompt

/** Density of x_t at t up to a constant, and the mean x, y of x0 given it, for data that are a mixture of Gaussians. */
function posterior({ means, spread }, [x, y], t, shares = ANY) {
  const a = 1 - t, [sx, sy] = spread, vx = (a * sx) ** 2 + t * t, vy = (a * sy) ** 2 + t * t;
  let least = Infinity, total = 0, mx = 0, my = 0;
  for (const m of means) least = Math.min(least, (x - a * m[0]) ** 2 / vx + (y - a * m[1]) ** 2 / vy);
  for (let k = 0; k < means.length; k++) {
    const dx = x - a * means[k][0], dy = y - a * means[k][1];
    const share = shares[k] * Math.exp((least - dx * dx / vx - dy * dy / vy) / 2);
    total += share;
    mx += share * (means[k][0] + a * sx * sx / vx * dx);
    my += share * (means[k][1] + a * sy * sy / vy * dy);
  }
  return { density: total * Math.exp(-least / 2), x0: [mx / total, my / total] };
}

function guided(scene, x, t, g) {
  const cond = posterior(scene.data, x, t, scene.prompt).x0;
  if (g === 1) return cond;
  const uncond = posterior(scene.data, x, t).x0;
  return [0, 1].map((i) => uncond[i] + g * (cond[i] - uncond[i]));
}

/** Points and weights that average over a standard normal in the plane. */
const NODES = Array.from({ length: 121 }, (_, i) => [0.75 * ((i % 11) - 5), 0.75 * (Math.floor(i / 11) - 5)]);
const WEIGHTS = NODES.map(([x, y]) => (0.75 ** 2 / (2 * Math.PI)) * Math.exp(-(x * x + y * y) / 2));

/** Modes that the prompt names. */
const named = ({ data, prompt }) => data.means.filter((_, k) => prompt[k] === 1);

/** What the teacher says of noised data, on average: DFD's line. */
function forcedX0(scene, t, g) {
  const { spread } = scene.data, mean = [0, 0], modes = named(scene);
  for (const m of modes)
    NODES.forEach((z, n) => {
      const xt = [0, 1].map((i) => (1 - t) * m[i] + Math.hypot((1 - t) * spread[i], t) * z[i]);
      const x0 = guided(scene, xt, t, g);
      for (const i of [0, 1]) mean[i] += (WEIGHTS[n] * x0[i]) / modes.length;
    });
  return mean;
}

/** Where samples at these places are pulled at level t: minus the gradient without its normaliser, over all noise. */
function field(scene, student, places, t, g = 1, dataProb = 0) {
  const forced = dataProb > 0 ? forcedX0(scene, t, g) : [0, 0];
  return places.map((x0) => {
    const down = [0, 0];
    NODES.forEach((z, n) => {
      const xt = [(1 - t) * x0[0] + t * z[0], (1 - t) * x0[1] + t * z[1]];
      const fake = posterior(student, xt, t).x0;
      const real = dataProb < 1 ? guided(scene, xt, t, g) : [0, 0];
      for (const i of [0, 1]) down[i] += WEIGHTS[n] * (dataProb * forced[i] + (1 - dataProb) * real[i] - fake[i]);
    });
    return down;
  });
}

/** A noise level of a score range, for a uniform u: levels below its beginning are set to that. */
const level = ([low, high], u) => Math.min(Math.max(high * u, low), 0.98);

const TENTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95];
function fieldOfRange(scene, student, places, range, g, dataProb) {
  const all = TENTHS.map((u) => field(scene, student, places, level(range, u), g, dataProb));
  return places.map((_, p) => [0, 1].map((i) => all.reduce((sum, one) => sum + one[p][i], 0) / 10));
}

/** Seeded uniform numbers (mulberry32), and normal pairs. */
function generator(seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
  const polar = (r, angle) => [r * Math.cos(angle), r * Math.sin(angle)];
  const normal = () => polar(Math.sqrt(-2 * Math.log(1 - uniform())), 2 * Math.PI * uniform());
  return { uniform, normal };
}

function clip(scene, random) {
  const modes = named(scene), m = modes[Math.floor(random.uniform() * modes.length)], z = random.normal();
  return [0, 1].map((i) => m[i] + scene.data.spread[i] * z[i]);
}

/** A step of the scripts, in place, for a student of one mode and its exact fake score, with DMD's normaliser. */
function dmdStep(scene, student, random, range, g, dataProb) {
  const [mean] = student.means, { spread } = student, sum = [0, 0, 0, 0];
  const forced = random.uniform() < dataProb;
  for (let n = 0; n < scene.count; n++) {
    const z = random.normal(), noise = random.normal(), t = level(range, random.uniform());
    const x0 = [0, 1].map((i) => mean[i] + spread[i] * z[i]);
    const noised = (x) => [0, 1].map((i) => (1 - t) * x[i] + t * noise[i]);
    const fake = posterior(student, noised(x0), t).x0;
    const real = guided(scene, noised(forced ? clip(scene, random) : x0), t, g);
    const weight = (Math.abs(x0[0] - real[0]) + Math.abs(x0[1] - real[1])) / 2 || Infinity;
    for (const i of [0, 1]) {
      const grad = (fake[i] - real[i]) / weight / scene.count;
      sum[i] += grad;
      sum[2 + i] += grad * z[i];
    }
  }
  for (const i of [0, 1]) {
    mean[i] -= scene.lr * sum[i];
    spread[i] -= scene.lr * sum[2 + i];
  }
}

/** CoDMD's relation_loss between samples: the loss, and where it pushes each. All are lists of [x, y]. */
function relations(x0, x0Teacher, x0Fake, temperature) {
  const units = (points) => points.map((p) => p.map((x) => x / Math.hypot(...p)));
  const cosines = (z) => z.map((a) => z.map((b) => a[0] * b[0] + a[1] * b[1]));
  const softmax = (row) => row.map((x) => 1 / row.reduce((sum, y) => sum + Math.exp((y - x) / temperature), 0));
  const n = x0.length, z = units(x0), s = cosines(z), real = cosines(units(x0Teacher)), fake = cosines(units(x0Fake));
  const target = s.map((row, i) => row.map((x, j) => x - (fake[i][j] - real[i][j])));
  const p = target.map(softmax), q = s.map(softmax);
  let loss = 0;
  const slope = p.map((row, i) => row.map((pij, j) => {
    loss += (pij * Math.log(pij / q[i][j])) / n;
    return (q[i][j] - pij) / temperature / n;  // of the loss in s
  }));
  const push = z.map((zi, i) => {
    const d = [0, 1].map((k) => z.reduce((sum, zj, j) => sum - (slope[i][j] + slope[j][i]) * zj[k], 0));
    const along = d[0] * zi[0] + d[1] * zi[1];
    return [0, 1].map((k) => (d[k] - along * zi[k]) / Math.hypot(...x0[i]));
  });
  return { loss, push, cosines: s, target };
}

// ------------------------------------------------------------------------------------------------- scenes

const SCENES = {  // the first two begin as the pictures of experiments/gradients.py
  "Two modes": {
    sliders: ["t", "low", "high", "p"],
    data: TWO, prompt: ANY, start: [-1.2, 0, 0.35, 0.35], lr: 0.02, count: 256,
  },
  "Three modes, and a prompt that names the upper": {
    sliders: ["t", "g", "low", "high", "p"],
    data: THREE, prompt: UPPER, start: [0, 0.6, 0.5, 0.5], lr: 0.01, count: 512,
  },
  "Relations of six samples": {
    sliders: ["t", "tau"], data: TWO, prompt: ANY, start: [0, 0.9, 0.7, 0.7],
    six: [[-1.057, 0.949], [-0.25, 1.078], [-0.468, 0.816], [0.421, 1.09], [0.9, 1.045], [0.906, 1.272]],
    noise: [[-0.081, 0.051], [-0.869, -0.276], [-1.272, 0.882], [-0.664, 0.264], [0.161, 1.176], [-0.362, 0.468]],
  },
};
const SLIDERS = {  // label, lowest, highest, step, first value
  t: ["Noise level", 0.02, 0.98, 0.02, 0.6],
  g: ["Guidance", 1, 8, 0.25, 2],
  low: ["Score range from", 0.02, 0.9, 0.02, 0.02],
  high: ["Score range to", 0.1, 0.98, 0.02, 0.98],
  p: ["Data probability (DFD)", 0, 1, 0.05, 0],
  tau: ["Temperature (CoDMD)", 0.05, 2, 0.05, 0.5],
};
const begin = ([x, y, w, h]) => ({ means: [[x, y]], spread: [w, h] });
const PLACES = Array.from({ length: 196 }, (_, i) => [(i % 14) * 0.4 - 2.6, Math.floor(i / 14) * 0.4 - 2.6]);

/** x0_teacher and x0_fake of the six samples, noised to level t. */
function predictions(scene, student, six, t) {
  const noised = six.map((x0, i) => [0, 1].map((k) => (1 - t) * x0[k] + t * scene.noise[i][k]));
  return [scene.data, student].map((mixture) => noised.map((x) => posterior(mixture, x, t).x0));
}

// --------------------------------------------------------------------------------------------------- page

function play(root) {
  const add = (parent, tag, more = {}, text = "") => {
    const node = parent.appendChild(Object.assign(document.createElement(tag), more));
    node.append(text);
    return node;
  };
  const knobs = {}, rows = {}, RED = "#c1272d", BLUE = "#3f7fd0";
  const panel = add(root, "div", { className: "play-panel" });
  const pick = add(add(panel, "label", {}, "Scene "), "select");
  for (const name of Object.keys(SCENES)) add(pick, "option", { value: name }, name);
  for (const [key, [label, min, max, step, value]] of Object.entries(SLIDERS)) {
    rows[key] = add(panel, "label", {}, `${label} `);
    const shown = add(rows[key], "output", {}, value);
    const input = add(rows[key], "input", { type: "range", min, max, step, value });
    knobs[key] = value;
    input.addEventListener("input", () => { shown.textContent = knobs[key] = Number(input.value); draw(); });
  }
  const whole = add(panel, "label", { className: "play-check" }), average = add(whole, "input", { type: "checkbox" });
  whole.append(" arrows: the mean over the score range");
  const [train, reset] = ["Train", "Reset"].map((word) => add(panel, "button", { className: "md-button" }, word));
  const words = add(panel, "p");
  const canvas = add(root, "canvas", { tabIndex: 0, role: "img" }), pen = canvas.getContext("2d");
  canvas.ariaLabel = "The plane. Drag, or move with the arrow keys; keys 1 to 6 choose a sample.";
  let scene, student, six, random, steps, running, frame, chosen, size;

  const dots = (({ normal }) => Array.from({ length: 200 }, normal))(generator(1));
  const spot = ([x, y]) => [((x + 3) / 6) * size, ((3 - y) / 6) * size];
  const dot = (point, radius, color) => {
    pen.fillStyle = color;
    pen.beginPath(), pen.arc(...spot(point), radius, 0, 7), pen.fill();
  };
  const arrow = ([x, y], [dx, dy], width) => {
    const from = spot([x, y]), to = spot([x + dx, y + dy]), angle = Math.atan2(to[1] - from[1], to[0] - from[0]);
    const head = Math.min(0.012 * size, Math.hypot(to[0] - from[0], to[1] - from[1]));
    [pen.strokeStyle, pen.lineWidth] = [BLUE, width];
    pen.beginPath(), pen.moveTo(...from), pen.lineTo(...to);
    for (const turn of [angle - 0.5, angle + 0.5])
      pen.moveTo(...to), pen.lineTo(to[0] - head * Math.cos(turn), to[1] - head * Math.sin(turn));
    pen.stroke();
  };
  const longest = (vectors) => Math.max(1e-12, ...vectors.map((v) => Math.hypot(...v)));
  const guidance = () => (scene.sliders.includes("g") ? knobs.g : 1);

  function shade() {  // the clean data's density
    const small = Object.assign(document.createElement("canvas"), { width: 60, height: 60 });
    const image = new ImageData(60, 60);
    for (let i = 0; i < 3600; i++) {
      const x = [-2.95 + 0.1 * (i % 60), 2.95 - 0.1 * Math.floor(i / 60)];
      image.data.set([128, 128, 128, 150 * Math.min(posterior(scene.data, x, 0).density, 1)], 4 * i);
    }
    small.getContext("2d").putImageData(image, 0, 0);
    pen.drawImage(small, 0, 0, size, size);
  }

  function draw() {
    const { t, low, high, p, tau } = knobs, ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = size = Math.round(canvas.clientWidth * ratio);
    shade();
    if (scene.six) {
      const [teacher, fake] = predictions(scene, student, six, t), { loss, push } = relations(six, teacher, fake, tau);
      const scale = 0.8 / longest(push);
      six.forEach((x, i) => dot(x, (i === chosen ? 8 : 5) * ratio, RED));
      six.forEach((x, i) => arrow(x, push[i].map((d) => d * scale), 2 * ratio));
      dot([0, 0], 3 * ratio, "#888888");
      return words.replaceChildren(`Relation loss ${loss.toFixed(3)}; longest push ${longest(push).toFixed(2)}.`);
    }
    const [of, where] = average.checked ? [fieldOfRange, [low, high]] : [field, t];
    const down = of(scene, student, PLACES, where, guidance(), p);
    const [mean] = student.means, { spread } = student, scale = 0.5 / longest(down);
    for (const z of dots) dot([mean[0] + spread[0] * z[0], mean[1] + spread[1] * z[1]], 2 * ratio, `${RED}90`);
    PLACES.forEach((x, i) => arrow(x, down[i].map((d) => d * scale), ratio));
    const near = down.filter((_, i) => Math.hypot(PLACES[i][0] - mean[0], PLACES[i][1] - mean[1]) < 0.5);
    const pull = near.reduce((sum, d) => sum + Math.hypot(...d), 0) / near.length;
    const pair = (x) => x.map((v) => v.toFixed(2)).join(", ");
    words.textContent = `Mean pull within 0.5 of the student's mean: ${pull.toFixed(2)}. Student: mean `
      + `(${pair(mean)}), spread (${pair(spread.map(Math.abs))}), after ${steps} steps.`;
  }

  function restart() {
    scene = SCENES[pick.value];
    student = begin(scene.start);
    [six, random, steps, running, chosen] = [(scene.six || []).map((x) => [...x]), generator(0), 0, false, 0];
    for (const key of Object.keys(rows)) rows[key].hidden = !scene.sliders.includes(key);
    whole.hidden = train.hidden = Boolean(scene.six);
    train.textContent = "Train";
    draw();
  }

  function go() {
    if (!running) return;
    for (let i = 0; i < 2; i++, steps++) dmdStep(scene, student, random, [knobs.low, knobs.high], guidance(), knobs.p);
    draw();
    frame = requestAnimationFrame(go);
  }

  const move = (to) => {
    (scene.six ? six : student.means)[chosen] = to.map((x) => Math.min(Math.max(x, -2.8), 2.8));
    draw();
  };
  const toPlane = (event) => [6 * event.offsetX / canvas.clientWidth - 3, 3 - 6 * event.offsetY / canvas.clientHeight];
  canvas.addEventListener("pointerdown", (event) => {
    const [x, y] = toPlane(event), far = ([a, b]) => Math.hypot(a - x, b - y);
    if (scene.six) chosen = six.reduce((best, point, i) => (far(point) < far(six[best]) ? i : best), 0);
    canvas.setPointerCapture(event.pointerId);
    move([x, y]);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && move(toPlane(event)));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    const [x, y] = (scene.six ? six : student.means)[chosen];
    if (scene.six && "123456".includes(event.key)) chosen = Number(event.key) - 1, draw();
    if (step) event.preventDefault(), move([x + step[0], y + step[1]]);
  });
  train.addEventListener("click", () => {
    train.textContent = (running = !running) ? "Stop" : "Train";
    cancelAnimationFrame(frame);
    go();
  });
  for (const [node, kind, act] of [[reset, "click", restart], [pick, "change", restart], [average, "change", draw]])
    node.addEventListener(kind, act);
  window.addEventListener("resize", draw);
  restart();
}

if (typeof module === "object")
  module.exports = { SCENES, PLACES, posterior, guided, field, dmdStep, relations, predictions, begin, generator };
else play(document.getElementById("play"));
