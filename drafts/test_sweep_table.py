def test_a_sweep_has_a_column_for_each_share_of_the_width():
    rows = [
        {"model": "smollm2-135m", "hook_name": "h", "start": start, "d_init": d_init}
        | {"dead_share": dead, "d_init_share": share}
        for start, d_init, share, dead in [
            ("random", "auto", 1.0, 0.5),
            ("subspace", "auto", 0.28, 0.1),
            ("subspace", 58, 58 / 576, 0.2),
            ("subspace", 58, 58 / 576, 0.4),
            ("subspace", 576, 1.0, 0.25),
        ]
    ]
    assert publish["sweep_table"](pd.DataFrame(rows)).splitlines() == [
        '| Model | Hook point | 0.1 | 1 | "auto" |',
        "|---|---|---:|---:|---:|",
        "| smollm2-135m | `h` | 30.00 % | 25.00 % | 10.00 % |",
    ]


