// What a person says of a reply: thumbs with a reason, and reports. Each mark is stored when it is made.

import { api } from "./api.js";
import { ask, chips, tellFailure, toast } from "./dialog.js";
import { iconButton, relabel, textButton } from "./controls.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

const REASONS = { up: ["correct", "helpful", "well_written", "other"],
  down: ["incorrect", "unhelpful", "ignored_instructions", "badly_written", "other"] };
const CATEGORIES = ["false", "harassment", "hate", "illicit", "self-harm", "sexual", "violence", "privacy", "other"];

/** Thumbs up and down; the one that counts is pressed, and pressing it again takes the vote back. */
export function voteButtons(message) {
  const make = (name, value) => {
    const act = () => press(message, name, value, show).catch(tellFailure);
    return iconButton(name, t(`vote_${name}`), `vote-${name}`, act);
  };
  const up = make("up", 1);
  const down = make("down", -1);
  const show = () => {
    up.setAttribute("aria-pressed", String(message.vote?.value === 1));
    down.setAttribute("aria-pressed", String(message.vote?.value === -1));
  };
  show();
  return [up, down];
}

async function press(message, name, value, show) {
  const path = `/api/messages/${message.id}/vote`;
  if (message.vote?.value === value) {
    await api(path, { method: "DELETE" });
    message.vote = null;
    show();
    return;
  }
  // The vote counts at once; the reason, if one is given, is added to it.
  message.vote = await api(path, { method: "PUT", body: { value } });
  show();
  const reason = chips("reason", REASONS[name].map((one) => ({ value: one, text: t(`reason_${one}`) })), t("reason"));
  const comment = commentField("reason-comment");
  const title = t(`vote_${name}_title`);
  if (!(await ask({ title, content: [reason.element, comment], ok: t("save") }))) return;
  const body = { value, reason: reason.value(), comment: comment.value.trim() };
  message.vote = await api(path, { method: "PUT", body });
  toast(t("thanks"));
}

/** Reports a message; a message that is reported can be reported again or the report withdrawn. */
export function flagButton(message) {
  const button = iconButton("flag", t("flag"), "flag", () => report(message).then(show).catch(tellFailure));
  const show = () => {
    button.setAttribute("aria-pressed", String(message.flagged));
    relabel(button, message.flagged ? t("flagged") : t("flag"));
  };
  show();
  return button;
}

async function report(message) {
  const own = message.flagged ? (await api("/api/flags")).data.filter((flag) => flag.message === message.id) : [];
  const category = h("select", { "aria-label": t("flag_category"), testid: "flag-category" },
    ...CATEGORIES.map((one) => h("option", { value: one, text: t(`category_${one}`) })));
  const comment = commentField("flag-comment");
  const before = own.length ? [earlier(message, own)] : [];
  const content = [...before, h("label", { class: "stack" }, t("flag_category"), category), comment];
  if (!(await ask({ title: t("flag_title"), content, ok: t("flag_ok") }))) return;
  await api(`/api/messages/${message.id}/flags`, {
    method: "POST", body: { category: category.value, comment: comment.value.trim() },
  });
  message.flagged = true;
  toast(t("flag_thanks"));
}

/** The reports that were made before, with a button that withdraws them. */
function earlier(message, flags) {
  const said = flags.map((flag) => t(`category_${flag.category}`)).join(", ");
  const withdraw = async () => {
    try {
      await Promise.all(flags.map((flag) => api(`/api/flags/${flag.id}`, { method: "DELETE" })));
      message.flagged = false;
      toast(t("flag_withdrawn"));
      line.closest("dialog").close();
    } catch (failure) {
      tellFailure(failure);
    }
  };
  const button = textButton(t("flag_withdraw"), "flag-withdraw", withdraw, "link");
  const line = h("p", { class: "notice" }, t("flag_earlier", { said }), " ", button);
  return line;
}

function commentField(testid) {
  return h("textarea", { rows: "3", placeholder: t("comment"), "aria-label": t("comment"), testid });
}
