"""Stands in for what Transformers' configuration tests set and read back, which its source distribution leaves out."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "problem_type": "regression",
    "num_labels": 5,
    "id2label": {i: f"class {i}" for i in range(5)},
}
"""Keys that every configuration takes, none at its default."""
