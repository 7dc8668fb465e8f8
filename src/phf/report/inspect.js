"use strict";
// The slider for the threshold: live counts, the segments next to it, and colours. All text is set as text.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const slider = document.getElementById("threshold");
  const percent = (share) => (share === null ? null : `${(100 * share).toFixed(share > 0 && share < 0.001 ? 3 : 1)}%`);
  const number = (value, digits = 3) => Number(value.toPrecision(digits)).toString();
  const set = (id, text) => document.getElementById(id).replaceChildren(text);

  const segment = (place) => {
    const row = data.near[place];
    const made = document.createElement("div");
    made.className = "doc";
    const head = document.createElement("span");
    head.className = "score";
    head.textContent = `${number(row.s)} · ${row.i}`;
    const text = document.createElement("pre");
    for (const [piece, kind] of row.p) {
      const part = kind ? document.createElement("mark") : document.createTextNode(piece);
      if (kind) {
        part.textContent = piece;
        part.title = kind;
      }
      text.append(part);
    }
    made.append(head, text);
    return made;
  };

  const show = () => {
    const step = data.steps[Number(slider.value)];
    slider.setAttribute("aria-valuetext", number(step.t, 6));
    set("at", number(step.t, 6));
    set("bad-count", Math.round(step.s * data.segments).toLocaleString("en"));
    set("bad-segments", percent(step.s));
    set("bad-chars", percent(step.c));
    if (step.k !== null) set("bad-tokens", percent(step.k));
    set("with-bad", percent(step.d));
    set("kept", percent(step.f));
    document.getElementById("above").replaceChildren(...step.a.map(segment));
    document.getElementById("below").replaceChildren(...step.b.map(segment));
    for (const part of document.querySelectorAll(".seg[data-s]")) {
      part.classList.toggle("bad", Math.fround(Number(part.dataset.s)) > Math.fround(step.t));
    }
  };
  slider.addEventListener("input", show);
  document.getElementById("choose").hidden = false;
  show();
})();
