"""Hypothesis strategies from the JSON schemas of an OpenAPI document: values that fit, and values that nearly do."""

from typing import Any

from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class Values:
    """Strategies for the schemas of one document; `known` are values that name something on the server."""

    def __init__(self, document: dict[str, Any], known: dict[str, list[Any]]) -> None:
        self._document = document
        self._known = known

    def nearly(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """Mostly values of the schema; now and then an arbitrary one, at any depth."""
        return self._of(schema, "") | self._of(schema, "") | ANYTHING

    def _of(self, schema: dict[str, Any], name: str) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        if "anyOf" in schema:
            return st.one_of([self._of(each, name) for each in schema["anyOf"]])
        if "enum" in schema or "const" in schema:
            return st.sampled_from(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind == "object" and "properties" in schema:
            return self._object(schema)
        if kind == "array":
            return self._array(schema, name)
        return self._scalar(schema, kind, name)

    def _object(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        fields = {name: self._of(each, name) | self._rarely(name) for name, each in schema["properties"].items()}
        required = {name: fields.pop(name) for name in schema.get("required", [])}
        return st.fixed_dictionaries(required, optional=fields)

    def _array(self, schema: dict[str, Any], name: str) -> st.SearchStrategy[Any]:
        if "prefixItems" in schema:
            return st.tuples(*(self._of(each, name) for each in schema["prefixItems"])).map(list)
        longest = min(schema.get("maxItems", 3) + 1, 18)
        return st.lists(self._of(schema["items"], name), max_size=longest)

    def _scalar(self, schema: dict[str, Any], kind: str | None, name: str) -> st.SearchStrategy[Any]:
        known = st.sampled_from(self._known[name]) if name in self._known else st.nothing()
        if kind == "string":
            return known | st.text(max_size=30)
        if kind == "integer":
            return known | st.integers(schema.get("minimum", -9) - 1, schema.get("maximum", 99) + 1)
        if kind == "number":
            return known | st.floats(-400, 400)
        if kind == "boolean":
            return st.booleans()
        return st.none() if kind == "null" else ANYTHING

    def _rarely(self, name: str) -> st.SearchStrategy[Any]:
        return st.sampled_from(self._known[name]) if name in self._known else ANYTHING
