"""The style sheet of the report's page: light or dark as the reader has it, phone to desktop."""

STYLE = """
:root { --ink: #1b1e23; --soft: #5a616b; --paper: #fff; --line: #dfe2e6; --bad: #b3261e;
  --good: #1b6e3a; --alarm: #fdecea; --quiet: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a4abb5; --paper: #15171a;
  --line: #33383f; --bad: #ff8a80; --good: #7fd69b; --alarm: #3a1a18; --quiet: #1f2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 66rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 0.75rem; }
.lead { color: var(--soft); margin: 0 0 1rem; }
.alarm, .notice { padding: 0.75rem 1.25rem; margin: 1rem 0; border-left: 0.3rem solid var(--soft);
  background: var(--quiet); }
.alarm { border-color: var(--bad); background: var(--alarm); }
.alarm h2, .notice h2 { margin: 0; font-size: 1.05rem; }
.alarm h2, .bad { color: var(--bad); }
.good { color: var(--good); }
ul { padding-left: 1.2rem; margin: 0.5rem 0; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; }
.swatch { margin-right: 0.4rem; vertical-align: -0.05em; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 1.75rem; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.4rem; }
th, td { text-align: left; padding: 0.4rem 0.8rem 0.4rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; overflow-wrap: normal;
  border-bottom-width: 2px; }
tbody th { font-weight: 500; min-width: 8rem; }
td { min-width: 4.5rem; }
td small { color: var(--soft); white-space: nowrap; }
code { font: 0.9em ui-monospace, "Liberation Mono", Menlo, monospace; }
summary { cursor: pointer; padding: 0.25rem 0; }
.settings th { width: 14rem; font-weight: 400; color: var(--soft); }
figure { margin: 0.5rem 0 1.5rem; max-width: 36rem; }
figure > svg { display: block; width: 100%; height: auto; }
figure text { fill: var(--ink) !important; font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 0.92rem; }
.pictures img { width: 6rem; height: auto; image-rendering: pixelated; display: block;
  border: 1px solid var(--line); }
dt { font-weight: 600; margin-top: 0.5rem; }
dd { margin: 0; color: var(--soft); }
@media (max-width: 46rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, caption { display: block; }
  tr { display: block; padding: 0.6rem 0; border-bottom: 1px solid var(--line); }
  th, td { display: block; border: 0; padding: 0.1rem 0; width: auto; }
  th, tbody th, td { min-width: 0; }
  tbody th { font-weight: 600; }
  td { display: grid; grid-template-columns: 7.5rem 1fr; gap: 0.5rem; }
  td::before { content: attr(data-label); color: var(--soft); }
  .pictures td { display: inline-block; width: 6.5rem; vertical-align: top; }
  .pictures td:last-child { display: block; width: auto; }
  .pictures td::before { display: block; font-size: 0.85em; }
}
"""
