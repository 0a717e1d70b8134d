// Runs before the first paint, so that a dark page does not flash white. Not a module: those wait for the document.
"use strict";
document.documentElement.dataset.theme = localStorage.getItem("nestling.theme") || "auto";
