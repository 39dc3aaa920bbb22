"use strict";
const text = (row, column) => {
  const cell = row.rows[0].cells[column];
  return cell.dataset.v ?? cell.textContent.trim();
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const numbers = !head.classList.contains("left") || head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const rising = before ? before === "descending" : !numbers;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (body) => {
        if (!numbers) return text(body, column).toLowerCase();
        const number = parseFloat(text(body, column));
        return Number.isNaN(number) ? -Infinity : number;
      };
      const keyed = [...table.tBodies].map((body) => [value(body), body]);
      keyed.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (rising ? 1 : -1));
      table.append(...keyed.map(([, body]) => body));
    });
  });
}
for (const input of document.querySelectorAll("input[type=search]")) {
  const table = document.getElementById(input.dataset.table);
  const count = document.getElementById(`${input.dataset.table}-count`);
  const bodies = [...table.tBodies].map((body) => [body, body.textContent.toLowerCase()]);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [body, content] of bodies) {
      body.hidden = !words.every((word) => content.includes(word));
      shown += body.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${bodies.length} shown`;
  };
  input.addEventListener("input", filter);
  filter();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.more");
  if (!button) return;
  const detail = button.closest("tbody").rows[1];
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", String(!detail.hidden));
});
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
