"""The frame of the HTML report: nothing is loaded from anywhere, no script runs, light and dark follow the reader's setting."""
from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d2023; --soft: #656b73; --rule: #e1e2df;
  --one: #2f6fd6; --two: #c27a1a; --three: #3f8f5b; --rest: #b9bdc3; --old: #9dbdec; --band: #2f6fd61f; --bad: #c0392b; --code: #f0f0ed; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f24; --ink: #e7e8ea; --soft: #9aa1ab; --rule: #30343b;
  --one: #78a9ff; --two: #e2a94f; --three: #74c693; --rest: #59606a; --old: #46618c; --band: #78a9ff2b; --bad: #ff7b6b; --code: #262a30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 4px; }
h3 { font-size: 14px; margin: 16px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0 12px; max-width: 75ch; }
p.soft, .soft, small { color: var(--soft); }
section > p:first-of-type { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 6px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 11px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: 12px; }
.plots + p { margin-top: 12px; }
figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 0; padding: 9px 10px 4px; min-width: 0; }
figcaption { font-size: 13px; font-weight: 600; display: flex; justify-content: space-between; gap: 8px; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--two); stroke-width: 1.4; stroke-dasharray: 4 3; }
.band { fill: var(--band); }
.dot { fill: var(--one); }
.dot.low { fill: var(--bad); }
.bar { fill: var(--one); }
.shares { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px; }
.share { display: grid; grid-template-columns: 150px 1fr 150px; gap: 12px; align-items: center; padding: 3px 0; }
.share b { display: flex; height: 18px; }
.share i { display: block; height: 100%; min-width: 1px; }
.share i + i { border-left: 1px solid var(--card); }
.share em { font-style: normal; font-variant-numeric: tabular-nums; text-align: right; }
.one { background: var(--one); } .two { background: var(--two); } .three { background: var(--three); }
.rest { background: var(--rest); } .old { background: var(--old); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 8px 0 0; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; vertical-align: -1px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: right; padding: 4px 12px; border-top: 1px solid var(--rule); white-space: nowrap; font-variant-numeric: tabular-nums; }
tr:first-child > * { border-top: 0; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { color: var(--soft); white-space: nowrap; width: 1%; vertical-align: top; }
.low td { color: var(--bad); }
pre { background: var(--code); border-radius: 8px; padding: 11px 14px; overflow-x: auto; margin: 8px 0;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { font: 0.93em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
ul { padding-left: 20px; margin: 6px 0; } li { overflow-wrap: anywhere; }
li.warning { color: var(--bad); }
summary { cursor: pointer; color: var(--one); margin: 12px 0 8px; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .share { grid-template-columns: 1fr auto; gap: 2px 10px; padding: 6px 0; }
  .share b { grid-column: 1 / -1; grid-row: 2; } th, td { padding: 4px 8px; } }
@media print { body { background: #fff; } figure, .tile, .wide, .shares { break-inside: avoid; } }
"""

FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
