// Elements made in one call, and the one place where HTML of the server's enters the page.

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "textContent", "indeterminate", "selected"]);

/**
 * An element: h("button", {class: "quiet", on: {click}, testid: "send", data: {id}, "aria-label": "Send"}, "Send").
 * Children that are null, undefined or false are left out, so that `condition && h(…)` works.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes, children);
  return element;
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, attributes, children);
  return element;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) set(element, name, value);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

function set(element, name, value) {
  if (value === null || value === undefined) return;
  if (name === "class") element.setAttribute("class", value);
  else if (name === "text") element.textContent = value;
  else if (name === "testid") element.dataset.testid = value;
  else if (name === "data") Object.assign(element.dataset, value);
  else if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
  else if (PROPERTIES.has(name)) element[name] = value;
  else if (value === true) element.setAttribute(name, "");
  else if (value !== false) element.setAttribute(name, value);
}

/**
 * Show sanitised HTML of the server's. Leading blocks that are the same stay as they are: a growing reply does not
 * flicker, and what is selected in it stays selected.
 */
export function showHtml(element, html) {
  const made = document.createElement("template");
  made.innerHTML = html;
  const fresh = [...made.content.childNodes];
  const old = [...element.childNodes];
  let same = 0;
  while (same < old.length && same < fresh.length && old[same].isEqualNode(fresh[same])) same += 1;
  old.slice(same).forEach((node) => node.remove());
  element.append(...fresh.slice(same));
}

/** Give an element these children; leading ones that it has already stay untouched, with their focus and selection. */
export function showChildren(element, children) {
  let same = 0;
  while (same < children.length && element.childNodes[same] === children[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...children.slice(same));
}

/**
 * Whether a key press is Enter that means "done": not Shift+Enter, and not the Enter with which an input method takes its
 * suggestion (Safari tells that one by the code 229 alone).
 */
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Run `act` once `wait` milliseconds have passed without another call. */
export function debounced(act, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), wait);
  };
}
