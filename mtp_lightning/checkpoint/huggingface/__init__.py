"""Pretrained models of others: their names, shapes and settings, both ways.

Between their tensors and our parameters stand *places*, neutral names (`places`): `layers.3.mlp.up_proj.weight`,
`modules.0.eh_proj.weight`. A family says where a place lies in its files (`TensorSource`), and what its config.json
means (`families`); an MTP layout says the same of extra modules (`modules`). Numbers of modules count extra tokens
only, as these formats do; they become offsets in `places`. `folder` opens what somebody else wrote (`HFCheckpoint`),
`plan` finds an origin for every parameter, `weights` carries values in and out.

To add a family: a row in `families.FAMILIES`, its name in `recipe/model_sections.Family`, and a case in
`tests/checkpoint/families.py`, where transformers is the judge.
"""
