use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::serve::app;

/// The routes of a server without its pages, as methods and paths in OpenAPI's form.
fn routes() -> BTreeSet<(String, String)> {
    let plain = |path: &str| path.replace("{*", "{");
    app::routes().paths().iter().map(|(method, path)| (method.to_string().to_lowercase(), plain(path))).collect()
}

#[test]
fn every_route_is_described_and_nothing_else() {
    let document = build(true);
    let described = document["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
        methods.as_object().unwrap().keys().map(move |method| (method.clone(), path.clone()))
    });
    assert_eq!(described.collect::<BTreeSet<_>>(), routes());
}

/// Every `$ref` in a value.
fn references<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| match (name.as_str(), value) {
            ("$ref", Value::String(target)) => found.push(target),
            _ => references(value, found),
        }),
        Value::Array(values) => values.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_to_something_and_every_schema_is_used() {
    let document = build(true);
    let mut found = Vec::new();
    references(&document, &mut found);
    for target in &found {
        let pointer = target.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{target}");
    }
    for name in document["components"]["schemas"].as_object().unwrap().keys() {
        assert!(found.contains(&format!("#/components/schemas/{name}").as_str()), "{name} is not used");
    }
}

/// Types of one name would hide each other.
#[test]
fn schemas_of_one_name_are_the_same() {
    let mut seen: BTreeMap<String, Value> = BTreeMap::new();
    for operation in operations() {
        for (name, schema) in operation.schemas {
            let schema = serde_json::to_value(schema).unwrap();
            assert_eq!(*seen.entry(name.clone()).or_insert_with(|| schema.clone()), schema, "{name}");
        }
    }
}

#[test]
fn operations_have_names_of_their_own_and_examples() {
    let document = build(false);
    let mut ids = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for operation in methods.as_object().unwrap().values() {
            assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{path}");
            if let Some(body) = operation.get("requestBody") {
                assert!(body["content"]["application/json"]["example"].is_object(), "{path}");
            }
        }
    }
}

#[test]
fn keys_are_asked_for_where_they_are_needed() {
    let security = |has_keys: bool, path: &str| build(has_keys)["paths"][path]["get"]["security"].clone();
    assert_eq!(security(true, "/health"), json!([]));
    assert_eq!(security(true, "/openapi.json"), json!([]));
    assert_eq!(security(true, "/v1/models"), json!([{ "bearer": [] }, { "x-api-key": [] }]));
    assert_eq!(security(false, "/v1/models"), json!([{}, { "bearer": [] }, { "x-api-key": [] }]));
}
