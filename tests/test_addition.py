"""Text, tokens, critical tokens and samplers against the golden file made with the authors' template."""

import json
import pathlib

import pytest

from ckl_jax import addition

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "scratchpads.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['a']}+{c['b']}/{c['max_pretrain_digits']}" for c in GOLDEN])
def test_text_and_critical_tokens_equal_the_golden_file(case):
    a, b, limit = case["a"], case["b"], case["max_pretrain_digits"]
    answer = addition.answer_text(a, b)
    assert addition.prompt_text(a, b) == case["prompt"]
    assert answer == case["answer"]
    assert addition.result_text(a, b) == case["result"]
    found = addition.critical_tokens(a, b, limit)
    as_golden = [
        {
            "step": t.step,
            "operand": t.operand,
            "name": t.name,
            "pos_in_operand_list": t.position_in_list,
            "char": t.character,
        }
        for t in found
    ]
    assert as_golden == case["critical_tokens"]
    assert all(answer[t.index] == t.character for t in found)
    assert len({t.index for t in found}) == len(found)
