"""The whole of the main job in miniature: what a run leaves behind, and that nothing disturbs its bytes."""


def test_demo_run_has_the_release_folders(demo_run):
    assert all((demo_run / part / "README.md").is_file() for part in ("saes", "neurons", "examples", "inspector"))
