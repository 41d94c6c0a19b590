"""The page's style: light, dark, and on paper."""

_LIGHT = """
  --page: #fcfcfb; --ink: #1c1c1a; --soft: #5f5e5a; --line: #dddbd4; --box: #f3f2ee;
  --warn: #8a4b00; --warn-box: #fdf1df;
  --good: #17663f; --bad: #a3261b; --loss: #d2581d; --gain: #2a6fc9;
  --s0: #2a6fc9; --s1: #c2541b; --s2: #1b8a63; --s3: #8a4fbf; --s4: #a8326b; --s5: #8a7400;
  --s6: #2e8c9e; --s7: #6b4a2b;
  --b0: #55534e; --b1: #8b8980; --b2: #a88f5a; --b3: #1c1c1a;
"""
_DARK = """
  --page: #191917; --ink: #ecebe6; --soft: #a9a79f; --line: #3b3a36; --box: #242421;
  --warn: #f2b766; --warn-box: #35291a;
  --good: #63cf98; --bad: #ff8f80; --loss: #e8753a; --gain: #5c98ea;
  --s0: #6aa5f0; --s1: #ec8a55; --s2: #4fc197; --s3: #bb8ce6; --s4: #e37aa9; --s5: #d0b83c;
  --s6: #6cc3d3; --s7: #c29a72;
  --b0: #b9b7af; --b1: #8d8b83; --b2: #c9b27c; --b3: #ecebe6;
"""
_SERIES = " ".join(
    [f".s{number} {{ color: var(--s{number}); }}" for number in range(8)]
    + [f".b{number} {{ color: var(--b{number}); }}" for number in range(4)]
)

STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} --page: #fff; --ink: #000; --soft: #444; }} }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word;
}}
h1 {{ font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .4rem; }}
p, ul, dl {{ margin: .5rem 0; max-width: 46rem; }}
ul {{ padding-left: 1.2rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; overflow-wrap: anywhere; min-width: 0; }}
.soft, .note {{ color: var(--soft); }}
.note {{ font-size: .88rem; }}
.good {{ color: var(--good); font-weight: 600; }} .bad {{ color: var(--bad); font-weight: 600; }}
.open {{ color: var(--warn); font-weight: 600; }}
.warnings {{ background: var(--warn-box); border-left: 4px solid var(--warn); padding: .6rem 1rem; }}
.warnings p {{ color: var(--warn); font-weight: 600; margin: 0; }}
.warnings ul {{ max-width: none; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: baseline; }}
th:first-child {{ text-align: left; padding-left: 0; }}
td.text {{ text-align: left; }} td.line {{ white-space: nowrap; }} td.wide {{ min-width: 26rem; }}
thead th {{ border-bottom: 2px solid var(--soft); vertical-align: bottom; }}
tbody th {{ font-weight: 400; }}
tr.baseline th, tr.baseline td {{ color: var(--soft); }}
small {{ color: var(--soft); display: block; white-space: nowrap; font-weight: 400; }}
.figures {{ display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }}
figure {{ margin: .5rem 0; max-width: 36rem; min-width: 0; break-inside: avoid; }}
figcaption {{ font-weight: 600; font-size: .95rem; }}
figure > svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font: 12px system-ui, sans-serif; fill: var(--soft); }}
svg text.value {{ fill: var(--ink); }}
.grid {{ stroke: var(--line); }} .axis {{ stroke: var(--soft); }}
.frame {{ fill: none; stroke: var(--soft); stroke-width: .7; }}
polyline {{ fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }}
.b0 polyline, .b1 polyline, .b2 polyline {{ stroke-dasharray: 5 4; stroke-width: 1.5; }}
.bar {{ stroke: currentColor; stroke-width: 1.5; opacity: .6; }}
g circle, g rect, g path, .key svg circle, .key svg path, .key svg rect {{ fill: currentColor; }}
svg .loss, .key svg .loss {{ fill: var(--loss); }} svg .gain {{ fill: var(--gain); }}
svg .none {{ fill: none; }} .key svg .frame {{ fill: none; }}
.keys {{ display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .88rem; }}
.key svg {{ width: 16px; height: 14px; vertical-align: -2px; margin-right: .25rem; }}
.prompt {{ border: 1px solid var(--line); padding: .5rem .8rem; margin: .6rem 0; break-inside: avoid; }}
.prompt > p {{ margin: 0 0 .3rem; max-width: none; }}
.sides {{ display: grid; gap: .5rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }}
.sides > div {{ min-width: 0; }}
pre {{
  background: var(--box); padding: .5rem; margin: .2rem 0; font-size: .82rem; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere;
}}
{_SERIES}
@media (min-width: 36rem) {{ tbody th {{ white-space: nowrap; }} }}
@media (max-width: 36rem) {{
  body {{ padding: .75rem; font-size: 15px; }}
  th, td {{ padding: .3rem .4rem; }}
  table {{ font-size: .82rem; }}
  dl {{ grid-template-columns: 1fr; }} dd {{ margin-bottom: .3rem; }}
}}
@media print {{
  @page {{ size: A4 landscape; margin: 12mm; }}
  body {{ padding: 0; max-width: none; font-size: 10pt; line-height: 1.35; print-color-adjust: exact; }}
  h2 {{ margin-top: 1rem; }} h2, h3 {{ break-after: avoid; }}
  table {{ font-size: 7.5pt; }} th, td {{ padding: .1rem .3rem; }}
  tr, .warnings {{ break-inside: avoid; }} thead {{ display: table-header-group; }}
  .figures {{ grid-template-columns: repeat(3, 1fr); }}
  .scroll {{ overflow: visible; }}
}}
"""
