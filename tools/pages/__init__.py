"""Parts that report, viewer and commands share.

html.py      pages and their fragments: sections, tables, figures
figures.py   SVG figures
pictures.py  what picture files say of who made them
terminal.py  the console for tables

Pages are made of what lies in templates: Jinja templates, style sheets, scripts.
"""
