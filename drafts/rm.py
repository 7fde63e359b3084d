"""rm.py FILE NAME... : remove top-level definitions (with decorators and a preceding comment-free gap)"""
import ast,sys
f,*names=sys.argv[1:]
src=open(f).read(); lines=src.splitlines(keepends=True)
cut=set()
for n in ast.parse(src).body:
    names_of=[getattr(n,"name",None)]
    if isinstance(n,(ast.Assign,)): names_of=[getattr(t,"id",None) for t in n.targets]
    if any(x in names for x in names_of):
        start=min([n.lineno]+[d.lineno for d in getattr(n,"decorator_list",[])])
        cut|=set(range(start,n.end_lineno+1))
        # blank lines after
        i=n.end_lineno+1
        while i<=len(lines) and not lines[i-1].strip(): cut.add(i); i+=1
open(f,"w").write("".join(l for i,l in enumerate(lines,1) if i not in cut).rstrip()+"\n")
