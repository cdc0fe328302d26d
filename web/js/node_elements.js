/** Elements of our own in nodes, as widgets that no workflow and no prompt holds. */

import { app } from "../../../scripts/app.js";

const CANVAS = { wheel: "processMouseWheel", pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
const [MAJOR, MINOR] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "0.0").split(".").map(Number);
const KNOWS_HIDE_IN_PANEL = MAJOR > 1 || MINOR >= 49; // 1.45 does not
const OURS = "evdit-in-node"; // the class of each such element
const owners = new WeakMap(); // element -> its node
const elements = new WeakMap(); // node -> its element; no node has two

/** Call `after` whenever the method `name` of `object` has been called. */
export function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    after();
    return result;
  };
}

/** Add an element to a node, with `options` of its widget. The canvas gets the wheel and the middle button, unless `keeps` an event. */
export function addElement(node, name, element, options, keeps = () => false) {
  element.classList.add(OURS);
  owners.set(element, node);
  elements.set(node, element);
  const usual = { serialize: false, hideOnZoom: false, hideInPanel: true, getValue: () => "", setValue: () => {} };
  // Earlier pages know this word alone, and Nodes 2.0 take it for themselves as well: there the panel keeps its empty row.
  if (!KNOWS_HIDE_IN_PANEL) usual.canvasOnly = !LiteGraph.vueNodesMode;
  const widget = node.addDOMWidget(name, name, element, { ...usual, ...options });
  widget.serialize = false;
  // The canvas hears nothing over an element: the page's own text boxes hand on the wheel and the middle button as well.
  for (const [type, method] of Object.entries(CANVAS)) {
    element.addEventListener(type, (event) => {
      if (keeps(event) || (type !== "wheel" && event.button !== 1 && !(event.buttons & 4))) return;
      event.preventDefault();
      event.stopPropagation();
      app.canvas[method](event);
    });
  }
  chain(node, "onAdded", () => settle());
  // The canvas makes a node higher while it draws it, when the box around it is drawn already.
  chain(node, "onResize", () => node.graph?.setDirtyCanvas(true, true));
  return widget;
}

let settling = false;

/**
 * Nodes 2.0 keep the element of the node that had a number, when undo makes a new node of it or another graph with one is opened.
 * Puts the element of the node that has the number now in its place, once the page has drawn what changed.
 */
export function settle() {
  if (settling || !LiteGraph.vueNodesMode) return;
  settling = true;
  requestAnimationFrame(() => {
    settling = false;
    for (const element of document.querySelectorAll(`.${OURS}`)) {
      const shown = owners.get(element);
      const now = app.canvas.graph?.getNodeById(shown.id);
      if (now !== shown && elements.has(now)) element.replaceWith(elements.get(now));
    }
  });
}
