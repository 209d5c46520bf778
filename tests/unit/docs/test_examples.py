"""Code in the README is code that a demo runs."""

import inspect
import re
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"


def test_the_second_example_of_the_readme_is_the_loop_of_the_demo() -> None:
    from examples.demo import rl

    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert inspect.getsource(rl.learn) in blocks
