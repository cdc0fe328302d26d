/** What the last run of a node said, in the node: for those that give a text to read. */

import { make } from "./elements.js";
import { addElement, chain } from "./node_elements.js";
import { Recent } from "./recent.js";
import { placeOf } from "./tabs.js";

// Node class -> what the text is, and px that it has at least.
const KINDS = {
  EVDiTReport: { name: (say) => say("report"), height: 120 },
  EVDiTSaveTilePlan: { name: (say) => say("savedPlan"), height: 56 },
};
const WIDTH = 320; // px: a report's lines are long
const MARGIN = 10; // px around the box
const said = new Recent(); // the text by node: undo and the page's tabs make nodes anew

/** Whether the nodes of this class show a text. */
export const showsText = (kind) => kind in KINDS;

/** The text in one node: a box that can be read, copied from and scrolled, never written in. */
export class NodeText {
  constructor(node, say) {
    this.node = node;
    this.say = say;
    const { name, height } = KINDS[node.comfyClass];
    this.name = () => name(say);
    this.box = make("textarea", { class: "comfy-multiline-input", readonly: "", spellcheck: "false", "data-capture-wheel": "true" });
    Object.assign(this.box.style, { width: "100%", height: "100%", minHeight: `${height}px`, boxSizing: "border-box", resize: "none" });
    // A drag selects text; it must not move the node. Other buttons are the canvas's.
    this.box.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
    const scrolls = (event) => event.type === "wheel" && !event.ctrlKey && this.box.scrollHeight > this.box.clientHeight;
    this.box.addEventListener("wheel", (event) => scrolls(event) && event.stopPropagation());
    addElement(node, "text_of_run", this.box, { getMinHeight: () => height + 2 * MARGIN, margin: MARGIN }, scrolls);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]); // a new one; what is opened has its own
    for (const event of ["onAdded", "onConfigure"]) chain(node, event, () => this.draw());
    this.draw();
  }

  draw() {
    this.box.setAttribute("aria-label", this.name());
    this.box.placeholder = this.say("textAfterRun");
    const text = said.get(placeOf(this.node)) ?? "";
    if (this.box.value !== text) this.box.value = text; // what is selected in it stays
  }

  show(text) {
    said.set(placeOf(this.node), text);
    this.draw();
  }
}
