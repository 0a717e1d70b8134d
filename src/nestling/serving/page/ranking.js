// Whether a reply that was asked for again is better than the one before: a ranking of the two.

import { api } from "./api.js";
import { textButton } from "./controls.js";
import { tellFailure } from "./dialog.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

const ORDERS = {
  better: (now, before) => [[now], [before]],
  same: (now, before) => [[now, before]],
  worse: (now, before) => [[before], [now]],
};

/** Whether two replies have been put in order already. */
export function areRanked(rankings, now, before) {
  return rankings.some(({ order }) => [now.id, before.id].every((id) => order.flat().includes(id)));
}

/** The question, with its three answers; `ranked(ranking)` is called with what is stored. */
export function rankQuestion(conversation, now, before, ranked) {
  const element = h("div", { class: "rank", role: "group", "aria-label": t("rank_question"), testid: "rank" });
  const answer = async (name) => {
    try {
      const body = { order: ORDERS[name](now.id, before.id) };
      const ranking = await api(`/api/conversations/${conversation}/rankings`, { method: "POST", body });
      element.replaceChildren(h("span", { role: "status", text: t("thanks") }));
      ranked(ranking);
    } catch (failure) {
      tellFailure(failure);
    }
  };
  const button = (name) => textButton(t(`rank_${name}`), `rank-${name}`, () => answer(name), "small-button");
  element.append(h("span", { text: t("rank_question") }), ...Object.keys(ORDERS).map(button));
  return element;
}
