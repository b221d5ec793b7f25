"""Several runs as one: prepare -> CPT -> SFT -> RM or DPO, each stage's export the next one's model.

A YAML file becomes stages (`spec`: every key, name and strop configuration checked), each of them one or two
parts: a preparation, a run, a run's export (`parts`). `begin` refuses what must not be; then every part
becomes a job that waits for those before it by Slurm's `afterok` (`jobs`), or has its turn on this machine
(`local`). What was submitted stands in the pipeline's directory (`graph`); how the parts stand is read from
runs, results and Slurm (`standing`) and drawn as a tree (`text`).
"""
