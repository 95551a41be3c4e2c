"use strict";
(() => {
  const PAGE = 200;
  const RISK = 2, SECONDS = 10, FILE = 1, STORE = 11, WEIGHTS = 12, PLACE = 13;
  const LABEL = 3, WHY = 4, SCORES = 5, TRIGGER = 6, ARCH = 7, STARTED = 8, RULES = 9;
  const COLUMNS = [0, FILE, RISK, LABEL, WHY, ARCH, STARTED, SECONDS, STORE];
  const NUMBERS = new Set([RISK, SECONDS]);

  const data = JSON.parse(document.getElementById("data").textContent);
  const { rows, texts, stores, verdicts } = data;
  const byId = id => document.getElementById(id);
  const table = byId("table"), body = table.tBodies[0], details = byId("details"), search = byId("search");
  const order = new Intl.Collator("en", { numeric: true });
  const state = { verdict: "all", words: [], column: null, down: false, page: 0 };
  let shown = rows;

  // All text goes through textContent: nothing from a model or a path is read as HTML.
  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const nameOf = row => row[WEIGHTS] ? `${row[FILE]}#${row[WEIGHTS]}` : row[FILE];
  const count = number => number.toLocaleString("en");

  function time(value) {
    if (value < 1) return `${value.toFixed(2)} s`;
    if (value < 60) return `${value.toFixed(1)} s`;
    return `${Math.floor(value / 60)} min ${String(Math.floor(value) % 60).padStart(2, "0")} s`;
  }

  function textOf(row, column) {
    if (column === 0) return verdicts[row[0]];
    if (column === FILE) return nameOf(row);
    if (column === RISK) return row[RISK] === null ? "–" : row[RISK].toFixed(3);
    if (column === SECONDS) return time(row[SECONDS]);
    if (column === STORE) return stores[row[STORE]];
    return texts[row[column]];
  }

  // ------------------------------------------------------------------------------------- one row

  function quoted(text) {
    return `'${text.replaceAll("'", `'"'"'`)}'`;
  }

  function command(row) {
    const unsure = [row[FILE], stores[row[STORE]]].some(text => /[\uFFFD…]/.test(text));
    if (unsure) return ["bdprune export", " writes the whole result."];
    const apart = row[FILE].startsWith("-") || stores[row[STORE]].startsWith("-") ? "-- " : "";
    return [`bdprune show ${apart}${quoted(stores[row[STORE]])} ${quoted(row[FILE])}`, " shows the whole result."];
  }

  function brief(row) {
    const made = element("div", undefined, "detail");
    made.append(element("p", texts[row[WHY]], "headline"));
    if (row[SCORES] !== row[WHY] && texts[row[SCORES]]) made.append(element("p", texts[row[SCORES]]));
    if (texts[row[TRIGGER]]) made.append(element("p", `Trigger: ${texts[row[TRIGGER]]}`));
    const [code, rest] = command(row), last = element("p", undefined, "note");
    last.append(element("code", code), rest);
    made.append(last);
    return made;
  }

  function atLength(row) {
    const article = row[PLACE] ? byId(`m${row[PLACE]}`) : null;
    return article ? article.querySelector(".detail").cloneNode(true) : brief(row);
  }

  function toggle(button, row) {
    const open = button.getAttribute("aria-expanded") === "true";
    const line = button.closest("tr");
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      line.nextElementSibling.remove();
      return;
    }
    const more = element("tr", undefined, "more"), cell = element("td");
    cell.colSpan = line.cells.length;
    cell.append(atLength(row));
    more.append(cell);
    line.after(more);
  }

  function line(row) {
    const made = element("tr");
    const verdict = element("td");
    verdict.append(element("span", verdicts[row[0]], `pill ${verdicts[row[0]]}`));
    const name = element("th", undefined, "path"), button = element("button", nameOf(row));
    name.scope = "row";
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => toggle(button, row));
    name.append(button);
    const why = element("td", texts[row[WHY]], "why");
    if (texts[row[TRIGGER]]) why.append(element("small", texts[row[TRIGGER]]));
    const cells = [verdict, name, element("td", textOf(row, RISK), "n"), element("td", texts[row[LABEL]], "text"), why,
      element("td", texts[row[ARCH]], "text"), element("td", texts[row[STARTED]], "n"), element("td", textOf(row, SECONDS), "n")];
    if (stores.length > 1) cells.push(element("td", stores[row[STORE]], "path"));
    made.append(...cells);
    return made;
  }

  // ------------------------------------------------------------------------------------- the table

  function draw() {
    const start = state.page * PAGE, page = shown.slice(start, start + PAGE);
    if (page.length) {
      body.replaceChildren(...page.map(line));
    } else {
      const none = element("td", "No model matches.", "none"), only = element("tr");
      none.colSpan = table.tHead.rows[0].cells.length;
      only.append(none);
      body.replaceChildren(only);
    }
    const of = `of ${count(shown.length)} model${shown.length === 1 ? "" : "s"}`;
    const all = shown.length === rows.length ? "" : `, ${count(rows.length)} in all`;
    byId("status").textContent = `${page.length ? `${count(start + 1)}–${count(start + page.length)}` : "0"} ${of}${all}`;
    byId("before").disabled = state.page === 0;
    byId("after").disabled = start + PAGE >= shown.length;
  }

  let haystack = null;

  function matches(index) {
    haystack ??= rows.map(row => [verdicts[row[0]], nameOf(row), stores[row[STORE]],
      ...[LABEL, WHY, SCORES, TRIGGER, ARCH, STARTED, RULES].map(one => texts[row[one]])].join("\n").toLowerCase());
    return state.words.every(word => haystack[index].includes(word));
  }

  function wanted(row, index) {
    const verdict = verdicts[row[0]];
    const fits = state.verdict === "all" || verdict === state.verdict ||
      (state.verdict === "attention" && ["backdoored", "suspicious", "error"].includes(verdict));
    return fits && (!state.words.length || matches(index));
  }

  function compare(one, other) {
    const column = state.column, sign = state.down ? -1 : 1;
    if (column === 0) return sign * (one[0] - other[0]);
    if (!NUMBERS.has(column)) return sign * order.compare(textOf(one, column), textOf(other, column));
    if (one[column] === null || other[column] === null) return (one[column] === null) - (other[column] === null);
    return sign * (one[column] - other[column]);
  }

  function update() {
    shown = rows.filter(wanted);
    if (state.column !== null) shown.sort(compare);
    state.page = 0;
    draw();
  }

  // ------------------------------------------------------------------------------------- the controls

  function pick(verdict) {
    state.verdict = state.verdict === verdict ? "all" : verdict;
    for (const button of byId("verdicts").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === state.verdict));
    }
    byId("attention").setAttribute("aria-pressed", String(state.verdict === "attention"));
    update();
  }

  // Every word must occur; words in double quotes must occur one after another.
  function find(text) {
    const parts = text.toLowerCase().match(/"[^"]+"|[^\s"]+/g) ?? [];
    state.words = parts.map(part => part.replaceAll('"', ""));
    update();
  }

  // Numbers start with the largest; a third click restores the order of seriousness.
  function sortBy(column, heading) {
    const first = NUMBERS.has(column);
    const steps = [[column, first], [column, !first], [null, false]];
    const now = steps.findIndex(([one, down]) => one === state.column && down === state.down);
    [state.column, state.down] = steps[state.column === column ? (now + 1) % 3 : 0];
    for (const one of table.tHead.rows[0].cells) one.setAttribute("aria-sort", "none");
    if (state.column !== null) heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    update();
  }

  function turn(by) {
    state.page += by;
    draw();
    byId("models").scrollIntoView({ block: "start" });
  }

  function prepare() {
    [...table.tHead.rows[0].cells].forEach((heading, place) => {
      const button = element("button", heading.textContent);
      button.type = "button";
      button.addEventListener("click", () => sortBy(COLUMNS[place], heading));
      heading.setAttribute("aria-sort", "none");
      heading.replaceChildren(button);
    });
    for (const cell of document.querySelectorAll("[data-search]")) {
      const button = element("button", cell.textContent);
      button.type = "button";
      button.addEventListener("click", () => {
        search.value = cell.dataset.search;
        find(search.value);
        byId("models").scrollIntoView({ block: "start" });
      });
      cell.replaceChildren(button);
    }
    for (const button of byId("verdicts").querySelectorAll("button")) {
      button.disabled = false;
      button.setAttribute("aria-pressed", String(button.dataset.verdict === "all"));
      button.addEventListener("click", () => pick(button.dataset.verdict));
    }
    byId("attention").addEventListener("click", () => pick("attention"));
    search.addEventListener("input", () => find(search.value));
    byId("before").addEventListener("click", () => turn(-1));
    byId("after").addEventListener("click", () => turn(1));
    byId("controls").hidden = false;
    if (details) details.hidden = true;
    find(search.value);  // a browser keeps the text of the search when it loads the page again
    performance.mark("ready");
  }

  prepare();
})();
