"""text with '# %% [md]', '# %%' and '# %% [parameters]' cells -> ipynb, keeping nothing of outputs"""
import sys, json, nbformat, re
src, dst = sys.argv[1:3]
cells=[]
for part in re.split(r"(?m)^# %%", open(src).read())[1:]:
    head, _, body = part.partition("\n"); body=body.strip("\n")
    if "[md]" in head: cells.append(nbformat.v4.new_markdown_cell(body))
    else:
        c=nbformat.v4.new_code_cell(body)
        if "[parameters]" in head: c.metadata["tags"]=["parameters"]
        cells.append(c)
try:
    old=nbformat.read(dst,4); meta=old.metadata
    links=re.search(r"(?s)<!-- links -->.*<!-- /links -->", old.cells[0].source)
    if links: cells[0].source=cells[0].source.replace("LINKS", links.group(0))
except FileNotFoundError: meta={}
nb=nbformat.v4.new_notebook(cells=cells, metadata=meta)
for i,c in enumerate(nb.cells): c["id"]=f"cell-{i}"
nbformat.write(nb,dst)
