// Elements of the page, HTML and SVG alike.

const SVG = "http://www.w3.org/2000/svg";

/** Make an HTML or SVG element with attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "line", "g"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
