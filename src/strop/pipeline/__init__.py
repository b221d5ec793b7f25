"""Several runs as one: prepare -> CPT -> SFT -> RM or DPO, each stage's export the next one's model.

A YAML file becomes stages (`spec`: every key, name and strop configuration checked) -> parts, each one job: a
preparation, a run, or a run's export (`parts`) -> jobs that wait for each other, by Slurm's `afterok` (`jobs`)
or one after the other on this machine (`local`). What was submitted stands in the pipeline's directory
(`graph`); how the parts stand is read from runs, results and Slurm (`standing`) and drawn as a tree (`text`).
"""
