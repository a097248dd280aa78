"""Numbers and pictures that say how well a method works, for model cards and comparisons.

- [`~diffusers_ext.evaluation.reconstruction`]: MSE, PSNR and SSIM per image
- [`~diffusers_ext.evaluation.representation`]: the linear probe
- [`~diffusers_ext.evaluation.pdae`]: PDAE against its base model and simple baselines
- [`~diffusers_ext.evaluation.posterior`]: inpainting methods against posteriors that are known exactly
- [`~diffusers_ext.evaluation.report`]: metrics.json, tables, picture grids, curves, a card's results

`diffusers-ext evaluate` runs them on a saved pipeline. They need `pip install "diffusers-ext[training]"`.
"""
