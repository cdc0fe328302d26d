/** The chart of a plan: layers x density, the tiles of one layer, and what the last run measured. Plain DOM and SVG. */

import { density, isFull, layerPattern, patternName, referenceFrames } from "./plan_text.js";
import { STYLE } from "./plan_style.js";

const SVG = "http://www.w3.org/2000/svg";
const COLORS = 6; // of --pattern-N in the style
const KEYS = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageUp: 5, PageDown: -5, Home: -1e9, End: 1e9 };
const LEAST_HEIGHT = 26; // px, until it is on the page; then `height` is what the content takes at the node's width
const LEAST_WIDTH = 150;
const short = (value) => (value < 100 ? Number(value.toPrecision(3)) : Math.round(value));
const percent = (share) => `${Math.round(100 * share)} %`;

/** Make an HTML or SVG element with attributes and children. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "line", "g"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export class PlanChart {
  /**
   * @param {(key: string, values?: object) => string} say the texts in the user's language
   * @param {{cycle: Function, writeOut: Function, setFrames: Function, setDepth: Function, grown: Function}} actions
   *   what the user asks for, and by how many px the height has changed
   */
  constructor(say, actions) {
    this.say = say;
    this.actions = actions;
    this.chosen = null; // the layer that the user chose
    this.hovered = null;
    this.element = make("div", { class: "evdit-plan-chart" });
    const root = this.element.attachShadow({ mode: "open" });
    this.summary = make("div", { class: "summary" });
    this.bars = make("svg", { class: "bars", role: "listbox", tabindex: "0", preserveAspectRatio: "none" });
    this.axis = make("div", { class: "axis", "aria-hidden": "true" });
    this.legend = make("div", { class: "legend" });
    this.tiles = make("svg", { class: "tiles", role: "img" });
    this.detail = make("div", { class: "detail" });
    this.controls = make("div", { class: "controls" });
    this.measured = make("div", { class: "measured", role: "status" });
    this.live = make("div", { class: "unseen", "aria-live": "polite" });
    const layer = make("div", { class: "layer" }, this.tiles, this.detail);
    this.body = make("div", { class: "body" }, this.bars, this.axis, this.legend, layer, this.controls, this.measured);
    const panel = make("div", { class: "panel", role: "group" }, this.summary, this.body, this.live);
    this.panel = panel;
    root.append(make("style", {}, STYLE), panel);
    this.height = LEAST_HEIGHT;
    new ResizeObserver(() => this.measure()).observe(panel);
    this.bars.addEventListener("keydown", (event) => this.onKey(event));
    this.bars.addEventListener("pointerleave", () => this.hover(null));
    // A click edits; it must not start to drag the node. Other buttons are the canvas's.
    panel.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  }

  measure() {
    if (this.panel.offsetWidth < LEAST_WIDTH) return; // not on the page, or folded: everything would wrap
    const before = this.height;
    this.height = this.panel.offsetHeight;
    this.actions.grown(this.height - before);
  }

  /**
   * Draw anew.
   * @param {{plan?: object, note?: string, frames: number, depth: number, editable: boolean, fixedFrames: boolean,
   *          measured?: object}} state a plan, or a note that says why there is none
   */
  draw(state) {
    this.state = state;
    this.panel.setAttribute("aria-label", this.say("title"));
    this.body.hidden = !state.plan;
    this.summary.textContent = state.note ?? "";
    this.summary.classList.toggle("note", !state.plan);
    if (!state.plan) return;
    this.patterns = [...Array(state.depth).keys()].map((i) => layerPattern(state.plan, i, state.depth));
    const telling = this.patterns.findIndex((k) => !isFull(k, state.frames));
    this.selected = Math.min(this.chosen ?? Math.max(telling, 0), state.depth - 1);
    this.drawSummary();
    this.drawBars();
    this.drawLegend();
    this.drawLayer();
    this.drawControls();
    this.drawMeasured();
  }

  /** Sparse patterns by falling density, with full first: the colour of each is its place here. */
  ranks() {
    const { frames } = this.state;
    const sparse = [...new Set(this.patterns.filter((k) => !isFull(k, frames)))].sort((a, b) => b - a);
    return this.patterns.some((k) => isFull(k, frames)) ? [null, ...sparse] : sparse;
  }

  color(k) {
    if (isFull(k, this.state.frames)) return "var(--pattern-full)";
    const sparse = this.ranks().filter((rank) => rank !== null);
    return `var(--pattern-${sparse.reverse().indexOf(k) % COLORS})`;
  }

  mean() {
    return this.patterns.reduce((sum, k) => sum + density(k, this.state.frames), 0) / this.patterns.length;
  }

  drawSummary() {
    this.summary.textContent = this.say("summary", { density: percent(this.mean()), frames: this.state.frames });
  }

  drawBars() {
    const { depth, frames, editable, measured } = this.state;
    this.bars.setAttribute("viewBox", `0 0 ${depth} 100`);
    this.bars.setAttribute("aria-label", this.say(editable ? "layersEditable" : "layers"));
    const columns = this.patterns.map((k, i) => {
      const height = 100 * density(k, frames);
      const option = make("g", { id: `layer-${i}`, role: "option", "aria-label": this.layerText(i), class: "column" });
      option.append(make("rect", { class: "hit", x: i, y: 0, width: 1, height: 100 }));
      option.append(make("rect", { x: i + 0.09, y: 100 - height, width: 0.82, height, style: `fill: ${this.color(k)}` }));
      option.addEventListener("pointerenter", () => this.hover(i));
      option.addEventListener("click", (event) => this.cycle(i, event.shiftKey));
      return option;
    });
    const lines = [50, 100].map((y) => make("line", { class: "grid", x1: 0, x2: depth, y1: 100 - y, y2: 100 - y }));
    if (measured?.density) {
      const y = 100 - 100 * measured.density;
      lines.push(make("line", { class: "measured-line", x1: 0, x2: depth, y1: y, y2: y }));
    }
    this.bars.replaceChildren(...columns, ...lines);
    this.bars.classList.toggle("editable", editable);
    this.axis.replaceChildren(make("span", {}, "0"), make("span", {}, this.say("axis")), make("span", {}, String(depth - 1)));
  }

  drawLegend() {
    const { frames, measured } = this.state;
    const entries = this.ranks().map((k) => {
      const count = this.patterns.filter((other) => patternName(other, frames) === patternName(k, frames)).length;
      const name = k === null ? this.say("full") : patternName(k, frames);
      return make("span", {}, make("i", { style: `background: ${this.color(k)}` }), `${name} × ${count}`);
    });
    if (measured?.density) entries.push(make("span", {}, make("i", { class: "dashed" }), this.say("measuredLegend")));
    this.legend.replaceChildren(...entries);
  }

  drawLayer() {
    const { frames, editable } = this.state;
    const layer = this.hovered ?? this.selected;
    for (const [i, column] of [...this.bars.querySelectorAll(".column")].entries()) {
      column.classList.toggle("selected", i === layer);
      column.setAttribute("aria-selected", String(i === this.selected));
    }
    this.bars.setAttribute("aria-activedescendant", `layer-${this.selected}`);
    const k = this.patterns[layer];
    drawTiles(this.tiles, k, frames);
    this.tiles.setAttribute("aria-label", `${this.layerText(layer)}. ${this.referenceText(k)}`);
    const key = (kind) => make("span", {}, make("i", { class: kind }), this.say(kind));
    this.detail.replaceChildren(
      make("b", {}, this.say("layerName", { layer })),
      make("span", {}, `${isFull(k, frames) ? this.say("full") : patternName(k, frames)}, ${percent(density(k, frames))}`),
      key("reference"), key("own"), key("skipped"),
      ...(editable ? [make("em", {}, this.say("hint"))] : []),
    );
  }

  layerText(layer) {
    const { frames } = this.state;
    const k = this.patterns[layer];
    const name = isFull(k, frames) ? this.say("full") : patternName(k, frames);
    return this.say("layerText", { layer, name, density: percent(density(k, frames)) });
  }

  referenceText(k) {
    const { frames } = this.state;
    return isFull(k, frames) ? "" : this.say("referenceText", { frames: referenceFrames(k, frames).join(", ") || "-" });
  }

  drawControls() {
    const { plan, frames, depth, fixedFrames, editable } = this.state;
    const children = [];
    const number = (key, value, max, act) => {
      const input = make("input", { type: "number", min: 1, max, value, "aria-label": this.say(key), title: this.say(`${key}Title`) });
      input.addEventListener("change", () => act(Math.min(max, Math.max(1, Math.round(Number(input.value)) || 1))));
      input.addEventListener("keydown", (event) => event.stopPropagation());
      children.push(make("label", {}, this.say(key), input));
    };
    if (!fixedFrames) number("frames", frames, 256, this.actions.setFrames);
    if (!plan.layers) number("depth", depth, 256, this.actions.setDepth);
    if (!plan.layers && editable) {
      const button = make("button", { type: "button", title: this.say("writeOutTitle") }, this.say("writeOut"));
      button.addEventListener("click", () => this.actions.writeOut());
      children.push(button);
    }
    this.controls.replaceChildren(...children);
  }

  drawMeasured() {
    const { measured } = this.state;
    this.measured.hidden = !measured;
    if (!measured) return;
    const { sparse, density: found, seconds } = measured;
    const text = sparse
      ? this.say("measured", { calls: sparse, density: percent(found), seconds: seconds.toFixed(1) })
      : this.say("measuredNone", { seconds: seconds.toFixed(1) });
    const reasons = Object.entries(measured.dense ?? {}).map(([reason, count]) => `${count} ${reason}`);
    const why = reasons.length ? this.say("stayedDense", { reasons: reasons.join(", ") }) : "";
    const { dense_step: dense, sparse_step: fast } = measured;
    const timed = fast
      ? this.say("timed", { dense: short(dense), sparse: short(fast), gain: (dense / fast).toFixed(2) })
      : "";
    // What was measured takes the place of the bound.
    const gain = measured.bound && !timed
      ? this.say("bound", { video: percent(measured.video), bound: measured.bound.toFixed(2) })
      : "";
    const lines = [[undefined, text], [timed, timed], [gain, gain], [why, why]].filter(([, line]) => line);
    this.measured.replaceChildren(...lines.map(([title, line]) => make("span", { title }, line)));
  }

  hover(layer) {
    this.hovered = layer;
    if (this.state?.plan) this.drawLayer();
  }

  cycle(layer, backwards) {
    this.selected = this.chosen = layer;
    if (!this.state.editable) return this.drawLayer();
    this.actions.cycle(layer, backwards);
    this.live.textContent = this.layerText(layer);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in KEYS) {
      this.hovered = null;
      this.selected = this.chosen = Math.min(this.state.depth - 1, Math.max(0, this.selected + KEYS[event.key]));
      this.drawLayer();
      this.live.textContent = this.layerText(this.selected);
    } else if (event.key === "Enter" || event.key === " ") {
      this.cycle(this.selected, event.shiftKey);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}

/** The T x T tile map: row = the frame that asks, column = the frame it sees. */
function drawTiles(svg, k, frames) {
  const references = new Set(referenceFrames(k, frames));
  const paths = { skipped: "", reference: "", own: "" };
  const side = frames > 48 ? 1 : 0.88;
  for (let row = 0; row < frames; row++) {
    for (let column = 0; column < frames; column++) {
      const kind = references.has(row) || references.has(column) ? "reference" : row === column ? "own" : "skipped";
      paths[kind] += `M${column} ${row}h${side}v${side}h-${side}z`;
    }
  }
  svg.setAttribute("viewBox", `0 0 ${frames} ${frames}`);
  svg.replaceChildren(...Object.entries(paths).map(([kind, d]) => make("path", { class: kind, d })));
}
