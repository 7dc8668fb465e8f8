"use strict";
// The page's own script: it sorts tables, shows the sources of numbers and browses samples. All text is set as text,
// never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const show = (value, digits = 5) => {
    if (value === null || value === undefined) return "–";
    return value !== 0 && Math.abs(value) < 10 ** -digits ? value.toExponential(1) : value.toFixed(digits);
  };

  const three = (value) => { // three digits that count
    if (value === null || value === undefined || value === 0) return value === 0 ? "0" : "–";
    if (Math.abs(value) < 1e-4) return value.toExponential(1);
    return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))));
  };
  const { factor } = data.scale;
  const score = (value) => three(value === null || value === undefined ? null : value * factor);

  // a click on a heading sorts its table, numbers as numbers
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    table.classList.toggle("wide", heads.length > 8); // on paper, each of its rows is a list
    for (const row of table.tBodies[0].rows) {
      [...row.cells].forEach((cell, column) => { cell.dataset.label = heads[column]?.textContent ?? ""; });
    }
    heads.forEach((head, column) => {
      const button = el("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => {
          const cell = row.cells[column];
          const text = cell.dataset.value ?? cell.textContent.trim();
          const number = Number(text.replace(/[,%]/g, ""));
          return text === "" || text === "–" ? null : Number.isNaN(number) ? text : number;
        };
        const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null); // missing values come last
          const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  // what scrolls sideways can be reached by keyboard, and says that there is more
  for (const box of document.querySelectorAll(".scroll")) {
    const look = () => {
      const more = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("more", more && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
      if (more) box.tabIndex = 0;
    };
    box.addEventListener("scroll", look);
    new ResizeObserver(look).observe(box);
  }

  // downloads of plots and numbers work without the files next to the page
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[download]");
    if (!link) return;
    const svg = link.closest("figure")?.querySelector("svg");
    const content = svg ? new XMLSerializer().serializeToString(svg).replaceAll("currentColor", "#222") : data.csv;
    link.href = URL.createObjectURL(new Blob([content], { type: svg ? "image/svg+xml" : "text/csv" }));
    link.download = svg ? `${link.dataset.name}.svg` : "numbers.csv";
  });

  // sources of numbers
  const dialog = document.getElementById("from");
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("click", (event) => {
    const place = event.target.closest("button[data-from]");
    if (place) {
      document.getElementById("from-title").textContent = `${place.dataset.what} of ${place.dataset.run}`;
      document.getElementById("from-value").textContent = place.textContent;
      const names = place.dataset.run in data.runs ? [place.dataset.run] : data.groups[place.dataset.run];
      const parts = names.flatMap((name) => {
        const list = el("dl", {}, el("dt", {}, "file"), el("dd", {}, place.dataset.from));
        for (const [title, text] of data.runs[name].about) list.append(el("dt", {}, title), el("dd", {}, text));
        return [el("h4", {}, name), list];
      });
      document.getElementById("from-runs").replaceChildren(...parts);
      dialog.showModal();
      return;
    }
    const button = event.target.closest("button[data-m]");
    if (!button) return;
    const { g, m } = button.dataset;
    const measure = data.measures[m];
    document.getElementById("from-title").textContent = `${measure.title} of ${g}`;
    const interval = button.nextSibling ? ` (${button.nextSibling.textContent})` : "";
    document.getElementById("from-value").textContent = `${button.textContent}${interval}: ${measure.about}.`;
    const runs = document.getElementById("from-runs");
    runs.replaceChildren();
    const scale = measure.percent ? 100 : measure.scale?.factor ?? 1;
    for (const name of [...data.groups[g], ...(m === "ratio" ? data.groups.mle ?? [] : [])]) {
      const run = data.runs[name];
      const value = run.values[m] ?? (m === "ratio" ? run.values.misalignment : undefined);
      const list = el("dl");
      const line = (title, text) => list.append(el("dt", {}, title), el("dd", {}, text));
      if (value) {
        const n = value.n ? `, n = ${value.n}` : "";
        const shown = value.mean === null ? null : value.mean * scale;
        const own = m === "ratio" ? data.measures.misalignment.scale : measure.scale;
        const mean = own ? three(m === "ratio" ? value.mean * own.factor : shown) : show(shown, measure.digits);
        line(m in run.values ? "this run" : "computed from", `${mean}${measure.percent ? "%" : ""}${n}`);
        line("file", value.source);
      }
      for (const [title, text] of run.about) line(title, text);
      runs.append(el("h4", {}, name), list);
    }
    dialog.showModal();
  });

  // the sample browser
  const at = (id) => document.getElementById(id);
  const names = Object.keys(data.runs);
  for (const name of names) at("left").append(el("option", { value: name }, name));
  at("right").append(el("option", { value: "" }, "nothing"));
  at("right").append(...names.map((name) => el("option", { value: name }, name)));
  const scenarios = [...new Set(names.flatMap((name) => Object.keys(data.runs[name].samples)))];
  for (const name of scenarios) at("scenario").append(el("option", { value: name }, name));
  if (names.length > 1) {
    const other = names.find((name) => name.startsWith("conditional")) ?? names[1];
    at("right").value = other === names[0] ? names[1] : other;
  }
  const all = names.flatMap((name) => Object.values(data.runs[name].samples).flat());
  const scores = all.flatMap((sample) => sample.g.map(([, score]) => score));
  const positive = scores.filter((score) => score !== null && score > 0).sort((a, b) => a - b);
  const strong = positive.length ? positive[Math.floor(positive.length * 0.9)] : 1; // scores from here on are fully red

  const hitsIn = (letters, wanted) => { // places of what was searched for, in characters
    if (!wanted) return [];
    const low = letters.map((letter) => letter.toLowerCase());
    const query = Array.from(wanted);
    const found = [];
    for (let n = 0; n + query.length <= low.length; n += 1) {
      if (query.every((letter, k) => low[n + k] === letter)) {
        found.push([n, n + query.length]);
        n += query.length - 1;
      }
    }
    return found;
  };
  const text = (sample) => {
    const found = document.createDocumentFragment();
    const letters = Array.from(sample.t); // positions count characters; JavaScript's strings count UTF-16 units
    const edges = new Set([0, sample.c, letters.length]);
    const hits = hitsIn(letters, at("find").value.toLowerCase());
    for (const [from, to] of hits) { edges.add(from); edges.add(to); }
    let start = 0;
    const segments = sample.g.map(([end, score]) => {
      const segment = [start, end, score];
      start = end;
      edges.add(end);
      return segment;
    });
    for (const [from, to] of sample.m) { edges.add(from); edges.add(to); }
    const cuts = [...edges].filter((x) => x >= 0 && x <= letters.length).sort((a, b) => a - b);
    for (let n = 0; n + 1 < cuts.length; n += 1) {
      const [from, to] = [cuts[n], cuts[n + 1]];
      let node = document.createTextNode(letters.slice(from, to).join(""));
      const mark = sample.m.find(([a, b]) => a <= from && to <= b);
      if (mark) node = el("mark", { title: mark[2] }, node);
      if (hits.some(([a, b]) => a <= from && to <= b)) node = el("mark", { class: "found" }, node);
      const segment = segments.find(([a, b]) => a <= from && to <= b);
      if (from >= sample.c) node = el("span", { class: "cut" }, node);
      else if (segment && segment[2] > 0) {
        const title = `score of the segment: ${score(segment[2])}${mark ? `, ${mark[2]}` : ""}`;
        const span = el("span", { class: "seg", title }, node);
        span.style.setProperty("--a", String(Math.round(12 + 48 * Math.min(1, segment[2] / strong))));
        node = span;
      }
      found.append(node);
    }
    return found;
  };
  const card = (run, sample) => {
    if (!sample) {
      const message = `${run}: no sample with this number and prompt`;
      return el("div", { class: "sample" }, el("span", { class: "score" }, message));
    }
    const pre = el("pre");
    if (sample.p) pre.append(el("span", { class: "prompt" }, sample.p));
    pre.append(text(sample));
    const head = `${run} · #${sample.i} · score ${score(sample.s)}${sample.f ? "" : " · cut at the length limit"}`;
    const scenario = at("scenario").value;
    const place = [run, sample.i, ...(scenario === scenarios[0] ? [] : [scenario])].map(encodeURIComponent).join("/");
    const link = el("a", { href: `#${place}`, "aria-label": `link to sample ${sample.i} of ${run}` }, "link");
    const copy = el("button", { type: "button", class: "copy", "aria-label": `copy sample ${sample.i} of ${run}` }, "copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(sample.p + sample.t).then(() => (copy.textContent = "copied"), () => {
        copy.textContent = "select and copy by hand";
      });
    });
    const tools = el("span", { class: "tools" }, link, " ", copy);
    return el("article", { class: "sample" }, el("span", { class: "score" }, head), tools, pre);
  };
  let shown = [];
  let first = 0;
  const list = () => {
    const [left, right, scenario] = ["left", "right", "scenario"].map((id) => at(id).value);
    const beside = right ? new Map((data.runs[right].samples[scenario] ?? []).map((s) => [s.i, s])) : null;
    const size = Number(at("size").value);
    first = Math.max(0, Math.min(first, shown.length - 1));
    const rows = shown.slice(first, first + size).map((sample) => {
      const row = el("div", { class: "row" }, card(left, sample));
      const other = beside?.get(sample.i);
      if (beside) row.append(card(right, other && other.p === sample.p ? other : undefined));
      return row;
    });
    at("list").replaceChildren(...rows);
    at("previous").disabled = first === 0;
    at("next").disabled = first + size >= shown.length;
    at("random").disabled = shown.length < 2;
    const samples = data.runs[left].samples[scenario] ?? [];
    const range = shown.length ? `${first + 1} to ${first + rows.length} of ` : "";
    at("count").textContent = `${range}${shown.length} of ${samples.length} samples; scores: ${data.scale.unit}`;
  };
  const move = (to) => { first = to; list(); };
  at("previous").addEventListener("click", () => move(first - Number(at("size").value)));
  at("next").addEventListener("click", () => move(first + Number(at("size").value)));
  at("random").addEventListener("click", () => move(Math.floor(Math.random() * shown.length)));
  const choose = () => {
    const samples = data.runs[at("left").value].samples[at("scenario").value] ?? [];
    const [low, high] = ["low", "high"].map((id) => (at(id).value === "" ? null : Number(at(id).value)));
    const find = at("find").value.toLowerCase();
    shown = samples.filter((s) =>
      (low === null || (s.s !== null && s.s * factor >= low)) &&
      (high === null || (s.s !== null && s.s * factor <= high)) &&
      (!find || s.t.toLowerCase().includes(find) || s.p.toLowerCase().includes(find)));
    const order = at("order").value;
    const last = (a, b) => (a.s === null) - (b.s === null); // samples that were not judged come last
    if (order !== "i") shown = [...shown].sort((a, b) => last(a, b) || (order === "up" ? a.s - b.s : b.s - a.s));
    move(0);
  };
  const follow = () => { // #run/12 or #run/12/scenario
    let asked = location.hash.slice(1);
    try { asked = decodeURIComponent(asked); } catch { return; }
    const [run, number, scenario] = asked.split("/");
    if (number === undefined) return;
    if (!(run in data.runs)) {
      at("count").textContent = `there is no run ${run} on this page`;
      at("samples").scrollIntoView();
      return;
    }
    at("left").value = run;
    if (at("right").value === run) at("right").value = names.find((name) => name !== run) ?? "";
    at("scenario").value = scenario in data.runs[run].samples ? scenario : scenarios[0];
    for (const id of ["low", "high", "find"]) at(id).value = "";
    at("order").value = "i";
    choose();
    const place = shown.findIndex((sample) => sample.i === Number(number));
    if (place >= 0) move(place);
    else at("count").textContent = `${run} has no sample ${number} on this page; ${at("count").textContent}`;
    at("samples").scrollIntoView();
    if (place >= 0) at("list").querySelector(".tools a")?.focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", follow);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").addEventListener("input", (event) => {
    if (event.target.id === "colour") document.body.classList.toggle("plain", !at("colour").checked);
    else choose();
  });
  choose();
  follow();
})();
