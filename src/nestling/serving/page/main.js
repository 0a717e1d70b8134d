// The shell: sidebar, header, and the view that the hash names. Views are loaded when they are first opened.

import { api } from "./api.js";
import { emit, on } from "./bus.js";
import { iconButton, textButton } from "./controls.js";
import { conversationList } from "./conversations.js";
import { tellFailure } from "./dialog.js";
import { h } from "./dom.js";
import { loadTexts, otherLanguage, switchLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { loadModels } from "./models.js";
import { problem } from "./parts.js";
import { isBusy } from "./replies.js";
import { themeSwitch } from "./theme.js";
import { egg } from "./welcome.js";

const VIEWS = {
  chat: (element, id, header) => import("./chat.js").then(({ show }) => show(element, id, header)),
  compare: (element, id, header) => import("./compare.js").then(({ show }) => show(element, id, header)),
  arena: (element) => import("./arena.js").then(({ show }) => show(element)),
  runs: (element) => import("./runs.js").then(({ show }) => show(element, { api, t })),
};
let leave = null; // ends the view that is shown
let main;
let bar;

async function start() {
  await loadTexts();
  const list = conversationList();
  const sidebar = makeSidebar(list);
  bar = h("div", { class: "bar-content" });
  const top = h("header", { class: "bar" }, drawerButton("menu", t("menu_open"), "menu-open", true), bar);
  main = h("main", { tabindex: "-1" });
  const shade = h("div", { class: "shade", on: { click: () => drawer(false) } });
  const first = () => main.querySelector("textarea") ?? main.querySelector("a, button");
  const skip = textButton(t("skip"), "skip", () => first()?.focus(), "skip main");
  document.body.append(skip, sidebar, shade, h("div", { class: "page" }, top, main));
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "k" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    drawer(true);
    list.focus();
  });
  route();
  loadModels().catch(tellFailure);
  list.load();
}

/** Show the view that the hash names: #/chat/ID, #/compare/ID, #/arena, #/runs. */
async function route() {
  const [name, id = ""] = location.hash.replace(/^#\//, "").split("/");
  const view = name in VIEWS ? name : "chat";
  drawer(false);
  leave?.();
  leave = null;
  emit("here", { id: null });
  document.querySelectorAll("[data-view]").forEach((link) => {
    link.setAttribute("aria-current", link.dataset.view === view ? "page" : "false");
  });
  main.setAttribute("aria-label", t(`nav_${view}`));
  document.title = view === "chat" ? "Nestling" : `${t(`nav_${view}`)} · Nestling`;
  // A view that arrives after another was asked for fills elements that nobody sees.
  const element = h("section", { class: "view", data: { view } });
  const header = h("div", { class: "bar-content" });
  bar.replaceChildren(header);
  main.replaceChildren(element);
  try {
    const end = await VIEWS[view](element, id, header);
    if (element.isConnected) leave = end ?? null;
    else end?.();
  } catch (failure) {
    element.replaceChildren(problem(failure, [{ label: t("retry"), testid: "retry", run: route }]));
  }
}

function makeSidebar(list) {
  const link = (name) => h("a", { href: `#/${name}`, testid: `nav-${name}`, data: { view: name } }, icon(name),
    h("span", { text: t(`nav_${name}`) }));
  const fresh = h("a", { class: "button new", href: "#/chat", testid: "new-chat" }, icon("plus"), t("new_chat"));
  // The address of a new conversation is that of an empty one: the view has to be told.
  fresh.addEventListener("click", () => { if (/^#?\/?(chat)?$/.test(location.hash)) route(); });
  const language = textButton(otherLanguage(), "language-switch", switchLanguage);
  on("busy", () => { language.disabled = isBusy(); }); // loading the page again would cut a reply off
  return h("aside", { class: "sidebar", id: "sidebar", "aria-label": t("menu"), testid: "sidebar" },
    h("div", { class: "brand" }, egg(), h("strong", { text: "Nestling" }),
      drawerButton("close", t("menu_close"), "menu-close", false)),
    h("nav", { class: "views", "aria-label": t("views") }, ...Object.keys(VIEWS).map(link)),
    fresh, list.search, list.element, h("div", { class: "tools" }, themeSwitch(), language));
}

function drawerButton(picture, label, testid, shows) {
  const more = { class: "quiet icon-only drawer", "aria-controls": "sidebar" };
  return iconButton(picture, label, testid, () => drawer(shows), more);
}

/** On a narrow screen the list is a drawer. */
function drawer(shows) {
  const was = document.body.classList.contains("drawer-open");
  document.body.classList.toggle("drawer-open", shows);
  if (was !== shows && matchMedia("(max-width: 760px)").matches) {
    document.querySelector(`[data-testid=menu-${shows ? "close" : "open"}]`)?.focus();
  }
}

addEventListener("keydown", (event) => { if (event.key === "Escape") drawer(false); });
start();
