// The page's pictures: strokes on a grid of 24, in the colour of the text around them.

import { svg } from "./dom.js";

/** A path that begins with ! is filled. */
const PATHS = {
  plus: ["M12 5v14", "M5 12h14"],
  search: ["M11 4a7 7 0 1 0 0 14a7 7 0 0 0 0-14", "M16.2 16.2L20 20"],
  pencil: ["M5 19l1-4L16.5 4.5a2.1 2.1 0 0 1 3 3L9 18z"],
  trash: ["M5 7h14", "M10 7V4.5h4V7", "M7 7l1 13h8l1-13"],
  menu: ["M4 7h16", "M4 12h16", "M4 17h16"],
  close: ["M6 6l12 12", "M18 6L6 18"],
  send: ["M12 19V5", "M6 11l6-6l6 6"],
  stop: ["M6.5 6.5h11v11h-11z"],
  copy: ["M9 9h10v11H9z", "M15 9V5H5v10h4"],
  check: ["M5 12.5l4.5 4.5L19 7"],
  again: ["M19 12a7 7 0 1 1-2.2-5.1", "M19.5 3.5v4.5h-4.5"],
  up: ["M7 20H4v-9h3",
    "M7 11l4-7.5c2 0 2.7 1.5 2.3 3.2L12.7 10H18.5c1.3 0 2.2 1.2 1.8 2.4l-1.9 6c-.3 1-1.1 1.6-2.1 1.6H7z"],
  down: ["M7 4H4v9h3",
    "M7 13l4 7.5c2 0 2.7-1.5 2.3-3.2L12.7 14H18.5c1.3 0 2.2-1.2 1.8-2.4l-1.9-6C18.1 4.6 17.3 4 16.3 4H7z"],
  flag: ["M6 21V4", "M6 5h11.5l-2.5 4l2.5 4H6"],
  tokens: ["M4 7h5v4H4z", "M11 7h9v4h-9z", "M4 13h8v4H4z", "M14 13h6v4h-6z"],
  left: ["M14.5 6l-6 6l6 6"],
  right: ["M9.5 6l6 6l-6 6"],
  below: ["M12 5v14", "M6 13l6 6l6-6"],
  sliders: ["M4 8h9", "M17 8h3", "M15 6v4", "M4 16h3", "M11 16h9", "M9 14v4"],
  chat: ["M5 5h14v11h-8l-4 4v-4H5z"],
  compare: ["M4 5h7v14H4z", "M13 5h7v14h-7z"],
  arena: ["M6 20v-7", "M12 20V5", "M18 20v-10"],
  runs: ["M4 18l5-6l4 3l7-9", "M15.5 6H20v4.5"],
  sun: ["M12 8a4 4 0 1 0 0 8a4 4 0 0 0 0-8",
    "M12 3v2", "M12 19v2", "M3 12h2", "M19 12h2", "M5.6 5.6L7 7", "M17 17l1.4 1.4", "M18.4 5.6L17 7", "M7 17l-1.4 1.4"],
  moon: ["M19.5 14.5A8 8 0 1 1 9.5 4.5a6.5 6.5 0 0 0 10 10z"],
  half: ["M12 4a8 8 0 1 0 0 16a8 8 0 0 0 0-16", "!M12 4a8 8 0 0 1 0 16z"],
  language: ["M12 4a8 8 0 1 0 0 16a8 8 0 0 0 0-16", "M4 12h16", "M12 4c3 2.5 3 13.5 0 16", "M12 4c-3 2.5-3 13.5 0 16"],
  key: ["M8 11a4 4 0 1 0 0 8a4 4 0 0 0 0-8", "M11 12.5L19.5 4", "M16 7.5l2.5 2.5"],
};

/** A picture that says nothing by itself: its button has a label. */
export function icon(name) {
  const paths = PATHS[name].map((d) => svg("path", d.startsWith("!") ? { d: d.slice(1), fill: "currentcolor" } : { d }));
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, ...paths);
}
