// The landscape: a scatter plot with one SVG path a domain, so that thousands of marks move as a few shapes.
// Text is set as text nodes only. Every listener sits on an element of the plot, and none is left behind with it; they
// are in landscape_input.js, which follows this in the same script.
const root = element.querySelector(".landscape");
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = 20; // pixels between the outermost points and the plot's edge
const MAX_ZOOM = 40;
const STEP = 1.5; // of a zoom button or key
const REACH = { mouse: 14, touch: 26 }; // pixels around a point that count as the point
const GAP = 14; // pixels between a point and its label
const STILL = 6; // pixels that a finger may move and still be a click
const AT_ONCE = 1000; // marks that are made anew in every frame of a zoom; more are stretched until it rests
const REST = 150; // milliseconds
const N_COLOURS = 5;

// Each shape as path commands from the mark's middle; r is its size in pixels. The cross is for no domain.
const SHAPES = [
  (r) => `m${-r},0a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0z`,
  (r) => `m${-0.88 * r},${-0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}z`,
  (r) => `m0,${-1.2 * r}l${1.15 * r},${2 * r}h${-2.3 * r}z`,
  (r) => `m0,${-1.3 * r}l${1.3 * r},${1.3 * r}l${-1.3 * r},${1.3 * r}l${-1.3 * r},${-1.3 * r}z`,
  (r) => `m0,${1.2 * r}l${1.15 * r},${-2 * r}h${-2.3 * r}z`,
  (r) => `m${-1.15 * r},${-0.6 * r}h${2.3 * r}v${1.2 * r}h${-2.3 * r}z`,
];
const CROSS = (r) => `m${-0.75 * r},${-0.75 * r}l${1.5 * r},${1.5 * r}m0,${-1.5 * r}l${-1.5 * r},${1.5 * r}`;

const off = new Set(); // ids of the domains that are switched off
const camera = { zoom: 1, x: 0, y: 0 }; // the pan in pixels
const fingers = new Map(); // {pointer id: its place}
let data = { points: [], domains: [] };
let box = {}; // the middle of the points, and half their extent
let drawnAs = []; // the place in data.domains that each point is drawn as; -1 for a hidden one
let active = -1; // the point whose label is shown
let last = -1; // the point whose label was shown last: the keyboard goes on from there
let opened = ""; // the id of the neuron whose card was opened here
let travelled = 0;
let asked = 0; // the animation frame that will draw
let painted = null; // the scale and the size that the marks were made for
let resting = 0; // the timer that makes them anew
let parts = {};

// --- making the elements --------------------------------------------------------------------------------------------

function child(parent, tag, attributes = {}, text = "") {
  const drawn = tag === "svg" || parent.namespaceURI === SVG;
  const made = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return parent.appendChild(made);
}

function look(i) {
  const none = data.domains[i].id === "";
  return { stamp: none ? CROSS : SHAPES[i % SHAPES.length], class: none ? "none" : `colour-${i % N_COLOURS}` };
}

function makeLegend(bar) {
  const legend = child(bar, "div", { class: "legend", role: "group", "aria-label": "Domains that are drawn" });
  data.domains.forEach(({ id, title }, i) => {
    const count = data.points.filter(([, , , domains]) => domains.includes(i)).length;
    if (!count) return;
    const button = child(legend, "button", { type: "button", "aria-pressed": !off.has(id) });
    const mark = child(button, "svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": true });
    child(mark, "path", { class: look(i).class, d: `M0,0${look(i).stamp(5.5)}` });
    child(button, "span", {}, title);
    child(button, "span", { class: "count" }, count.toLocaleString("en"));
    button.addEventListener("click", () => toggle(button, id));
  });
}

function makePlot() {
  const kind = { role: "application", "aria-roledescription": "scatter plot" };
  const names = { "aria-label": data.caption, "aria-describedby": "landscape-note" };
  const plot = child(root, "div", { class: "plot", tabindex: 0, ...kind, ...names });
  const marks = child(plot, "svg", { class: "marks", "aria-hidden": true }); // its origin is the plot's middle
  const under = data.domains.map((_, i) => i).sort((a, b) => !data.domains[b].id - !data.domains[a].id);
  const paths = [];
  for (const i of under) paths[i] = child(marks, "path", { class: look(i).class, "data-domain": data.domains[i].id });
  const over = child(plot, "svg", { class: "over", "aria-hidden": true });
  const rings = [child(over, "circle", { class: "ring opened" }), child(over, "circle", { class: "ring" })];
  const label = child(plot, "div", { class: "label", role: "status" });
  parts = { plot, marks, paths, rings, label };
  listen(plot);
}

function makeZoom(bar) {
  const group = child(bar, "div", { class: "zoom", role: "group", "aria-label": "Zoom" });
  const buttons = [["+", "Zoom in", STEP], ["−", "Zoom out", 1 / STEP], ["Reset", "Show the whole landscape", 0]];
  for (const [text, name, factor] of buttons) {
    const button = child(group, "button", { type: "button", "aria-label": name, title: name }, text);
    button.addEventListener("click", () => (factor ? zoomAt(factor, 0, 0) : reset()));
  }
}

function makeNote() {
  const note = child(root, "p", { class: "note-line", id: "landscape-note" });
  parts.count = child(note, "span", { class: "shown" });
  const keys =
    "the arrow keys walk from neuron to neuron, Home and End go to the first and the last, Enter opens the card";
  child(note, "span", {}, ` ${data.note} Drag to move; Ctrl and the wheel, + and − zoom. With the keyboard: ${keys}.`);
}

function render() {
  data = { points: [], domains: [], ...JSON.parse(props.value) };
  [parts, active, last, painted] = [{}, -1, -1, null];
  root.replaceChildren();
  child(root, "p", { class: "caption" }, data.message || data.caption);
  if (!data.points.length) return;
  box = boxOf(data.points);
  const bar = child(root, "div", { class: "bar" });
  makeLegend(bar);
  makeZoom(bar);
  makePlot();
  makeNote();
  assign();
  new ResizeObserver(redraw).observe(parts.plot);
}

// --- where things are -----------------------------------------------------------------------------------------------

function boxOf(points) {
  const range = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const [left, right] = range(points.map(([, x]) => x));
  const [low, high] = range(points.map(([, , y]) => y));
  return { x: (left + right) / 2, y: (low + high) / 2, width: right - left, height: high - low };
}

// Pixels to a unit of the coordinates, the same on both axes.
function scale() {
  const { clientWidth: width, clientHeight: height } = parts.plot;
  const fits = [[width, box.width], [height, box.height]].filter(([, extent]) => extent > 0);
  const least = Math.min(...fits.map(([pixels, extent]) => Math.max(pixels - 2 * MARGIN, 1) / extent));
  return (fits.length ? least : 1) * camera.zoom;
}

// From the plot's middle, in pixels, before the pan.
function placeOf(i, unit = scale()) {
  const [, x, y] = data.points[i];
  return [(x - box.x) * unit, (box.y - y) * unit];
}

function screenOf(i) {
  const [x, y] = placeOf(i);
  return [x + camera.x + parts.plot.clientWidth / 2, y + camera.y + parts.plot.clientHeight / 2];
}

function fromMiddle(event) {
  const { left, top } = parts.plot.getBoundingClientRect();
  const [x, y] = [event.clientX - left - parts.plot.clientLeft, event.clientY - top - parts.plot.clientTop];
  return [x - parts.plot.clientWidth / 2, y - parts.plot.clientHeight / 2];
}

function markSize() {
  const each = Math.sqrt((parts.plot.clientWidth * parts.plot.clientHeight) / data.points.length);
  return Math.min(Math.max(0.13 * each, 3), 6.5) * Math.min(camera.zoom ** 0.25, 2);
}

function nearest(x, y, reach) {
  const unit = scale();
  let [best, distance] = [-1, reach];
  for (let i = 0; i < data.points.length; i++) {
    if (drawnAs[i] < 0) continue;
    const [px, py] = placeOf(i, unit);
    const d = Math.hypot(px + camera.x - x, py + camera.y - y);
    if (d < distance) [best, distance] = [i, d];
  }
  return best;
}

// --- drawing --------------------------------------------------------------------------------------------------------

// A neuron of several domains is drawn as the first that is switched on.
function assign() {
  drawnAs = data.points.map(([, , , domains]) => domains.find((i) => !off.has(data.domains[i].id)) ?? -1);
  const n = drawnAs.filter((i) => i >= 0).length;
  parts.count.textContent = `${n.toLocaleString("en")} of ${data.points.length.toLocaleString("en")} neurons drawn.`;
  painted = null;
  if (active >= 0 && drawnAs[active] < 0) show(-1);
  redraw();
}

function redraw() {
  asked ||= requestAnimationFrame(draw);
}

function draw() {
  asked = 0;
  if (!parts.plot?.clientWidth) return;
  if (!painted || data.points.length <= AT_ONCE) paint();
  else if (painted.unit !== scale() || painted.r !== markSize()) paintAtRest();
  const stretch = painted.unit === scale() ? "" : ` scale(${scale() / painted.unit})`;
  parts.marks.style.transform = `translate(${camera.x.toFixed(1)}px, ${camera.y.toFixed(1)}px)${stretch}`;
  parts.plot.classList.toggle("zoomed", camera.zoom > 1);
  ring(parts.rings[0], data.points.findIndex(([id]) => id === opened));
  ring(parts.rings[1], active);
  putLabel();
}

function paintAtRest() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    painted = null;
    redraw();
  }, REST);
}

function paint() {
  const [unit, r] = [scale(), markSize()];
  if (painted?.unit === unit && painted.r === r) return;
  painted = { unit, r };
  const short = (path) => path.replace(/\d+\.\d{3,}/g, (text) => Number(text).toFixed(2));
  const stamps = data.domains.map((_, i) => short(look(i).stamp(r)));
  const drawn = data.domains.map(() => []);
  drawnAs.forEach((domain, i) => {
    if (domain < 0) return;
    const [x, y] = placeOf(i, unit);
    drawn[domain].push(`M${x.toFixed(1)},${y.toFixed(1)}${stamps[domain]}`);
  });
  drawn.forEach((marks, i) => parts.paths[i].setAttribute("d", marks.join("")));
}

function ring(circle, i) {
  circle.style.display = i < 0 || drawnAs[i] < 0 ? "none" : "";
  if (i < 0) return;
  const [x, y] = screenOf(i);
  for (const [name, value] of Object.entries({ cx: x, cy: y, r: markSize() + 4 })) circle.setAttribute(name, value);
}

// Where a label of a size begins: after its point, or before it where there is no room.
function beside(at, size, room) {
  const start = at + GAP + size > room ? at - GAP - size : at + GAP;
  return Math.max(4, Math.min(start, room - size - 4));
}

function putLabel() {
  if (active < 0) return;
  const { plot, label } = parts;
  const [x, y] = screenOf(active);
  label.style.left = `${beside(x, label.offsetWidth, plot.clientWidth)}px`;
  label.style.top = `${beside(y, label.offsetHeight, plot.clientHeight)}px`;
}
