"""Targets: one TOML file each, data only; read by vila_deploy.engine.target."""
