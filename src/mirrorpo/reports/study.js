// Sorting and filtering of arms. Without this script everything is shown in the order of the study.
for (const table of document.querySelectorAll(".numbers")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const title = head.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        if (column === 0) return (up ? 1 : -1) * (Number(key(b)) - Number(key(a)));
        const left = key(a), right = key(b);
        if (left === "" || right === "") return (left === "") - (right === "");  // what has no value stays last
        return (up ? 1 : -1) * (Number(left) - Number(right));
      });
      body.append(...rows);
    });
  });
}
const filter = document.getElementById("filter");
const count = document.getElementById("count");
const marked = [...document.querySelectorAll("[data-arm]")];
const names = new Set(marked.map((element) => element.dataset.arm));
const apply = () => {
  const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const shows = (name) => words.length === 0 || words.some((word) => name.toLowerCase().includes(word));
  for (const element of marked) element.classList.toggle("away", !shows(element.dataset.arm));
  const shown = [...names].filter(shows).length;
  count.textContent = words.length ? `${shown} of ${names.size} arms` : "";
};
filter.addEventListener("input", apply);
apply();
