def sweep_table(rows: pd.DataFrame) -> str:
    """Dead features of ASI by d_init at each hook point, means over seeds; 1 is the whole space."""
    rows = rows[rows["start"] == "subspace"]
    auto = rows["d_init"] == "auto"
    by_place = ["model", "hook_name"]
    swept = rows[~auto].assign(share=rows["d_init_share"].round(2))
    means = swept.groupby([*by_place, "share"])["dead_share"].mean().unstack()
    means.columns = [f"{share:g}" for share in means.columns]
    means['"auto"'] = rows[auto].groupby(by_place)["dead_share"].mean()
    lines = [f"| Model | Hook point | {' | '.join(means.columns)} |"]
    lines.append("|---|---|" + "---:|" * len(means.columns))
    for (model, hook_name), dead in means.iterrows():
        cells = " | ".join(f"{100 * share:.2f} %" for share in dead)
        lines.append(f"| {model} | `{hook_name}` | {cells} |")
    return "\n".join(lines)


