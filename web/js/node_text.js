/** What the last run of a node said, in the node: for those that give a text to read, and for Sparse Attention. */

import { make } from "./elements.js";
import { isLast, lastOf, withReport } from "./last_runs.js";
import { addElement, chain } from "./node_elements.js";
import { Recent } from "./recent.js";
import { placeOf } from "./tabs.js";
import { say } from "./texts.js";
import { percent } from "./tile_maps.js";

// Node class -> what the text is, px that it has at least, px around it, and its font where it is a sentence: two lines of it.
const KINDS = {
  EVDiTReport: { name: () => say("report"), height: 120, margin: 10 },
  EVDiTSaveTilePlan: { name: () => say("savedPlan"), height: 56, margin: 10 },
  EVDiTSparseAttention: { name: () => say("lastRun"), height: 30, margin: 4, font: "sans-serif" },
};
const WIDTH = 320; // px: a report's lines are long
const said = new Recent(); // the text by node, or a Sparse Attention's reports: undo and the page's tabs make nodes anew

/** Whether the nodes of this class show a text. */
export const showsText = (kind) => kind in KINDS;

/** The text in one node: a box that can be read, copied from and scrolled, never written in. */
export class NodeText {
  constructor(node) {
    this.node = node;
    const { name, height, margin, font = "" } = KINDS[node.comfyClass];
    this.name = name;
    this.box = make("textarea", { class: "comfy-multiline-input", readonly: "", spellcheck: "false", "data-capture-wheel": "true" });
    Object.assign(this.box.style, { width: "100%", height: "100%", minHeight: `${height}px`, boxSizing: "border-box", resize: "none", fontFamily: font });
    // A drag selects text; it must not move the node. Other buttons are the canvas's.
    this.box.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
    const scrolls = (event) => event.type === "wheel" && !event.ctrlKey && this.box.scrollHeight > this.box.clientHeight;
    this.box.addEventListener("wheel", (event) => scrolls(event) && event.stopPropagation());
    addElement(node, "text_of_run", this.box, { getMinHeight: () => height + 2 * margin, margin }, scrolls);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]); // a new one; what is opened has its own
    for (const event of ["onAdded", "onConfigure"]) chain(node, event, () => this.draw());
    this.draw();
  }

  draw() {
    this.box.setAttribute("aria-label", this.name());
    this.box.placeholder = say("textAfterRun");
    const found = said.get(placeOf(this.node)) ?? "";
    const text = typeof found === "string" ? found : lastOf(found).map(lineOf).join("\n");
    if (this.box.value !== text) this.box.value = text; // what is selected in it stays
  }

  show(text) {
    said.set(placeOf(this.node), text);
    this.draw();
  }

  /** What sparse attention did in a run of this node's MODEL: a line for each sampler of a prompt. */
  ran(report) {
    this.show(withReport(said.get(placeOf(this.node)) ?? [], report));
  }
}

/** A run in a line. What was measured stands on the node by itself, in the place of the bound. */
function lineOf(report) {
  const { sparse, calls = sparse, density, bound, dense_step: measured, why, seconds } = report;
  const gain = bound && !measured ? say(bound < 1 ? "runSlower" : "runBound", { bound: Math.max(bound, 1 / bound).toFixed(2) }) : "";
  const dense = why ? say("stayedDense", { reasons: why }) : say("measuredNone", { seconds: seconds.toFixed(1) });
  const line = sparse ? say("runSparse", { sparse, calls, density: percent(density) }) + gain : dense;
  return isLast(report) ? line : say("earlierRun", { line });
}
