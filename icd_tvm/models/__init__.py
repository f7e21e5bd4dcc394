"""Importers and model builders."""
