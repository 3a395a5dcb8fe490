//! `--network`: the network passed to TensorRT, as TensorRT reports it.

use std::collections::HashMap;
use std::fmt;

use aotron::backend::tensorrt::Layer;
use aotron::engine::tensorrt::{Binding, BindingRole};
use serde_json::{Value, json};

use super::tensorrt::ListingDetail;

/// The network of the main plan, and the layers of the context plan's.
pub struct Networks {
    pub title: String,
    pub bindings: Vec<Binding>,
    pub layers: Vec<Layer>,
    pub context_plan: Option<Vec<Layer>>,
    pub detail: ListingDetail,
}

/// A layer, split into the columns of the listing.
struct Row {
    /// Graph op that the layer was lowered from.
    scope: String,
    /// Number and operation within that op.
    name: String,
    kind: String,
    /// Types of the outputs.
    types: String,
    /// Outputs with names of their own: outputs of the network.
    named: Vec<String>,
    inputs: Vec<String>,
}

impl Row {
    fn of(layer: &Layer) -> Row {
        let (scope, name) = layer.name.split_once('/').unwrap_or(("", &layer.name));
        // TensorRT turns an attention into two layers and names them itself; their kinds tell them apart.
        let name = name.split_once("_Attention").map_or(name, |(name, _)| name);
        let outputs: Vec<(&str, &str)> = layer.outputs.iter().map(|text| split(text)).collect();
        let is_inside = |name: &&str| name.strip_prefix(scope).is_some_and(|rest| rest.starts_with('/'));
        Row {
            scope: scope.to_owned(),
            name: name.to_owned(),
            kind: layer.kind.clone(),
            types: outputs.iter().map(|(_, ty)| *ty).collect::<Vec<&str>>().join(", "),
            named: outputs.iter().map(|(name, _)| *name).filter(|name| !is_inside(name)).map(str::to_owned).collect(),
            inputs: layer.inputs.iter().map(|text| split(text).0.to_owned()).collect(),
        }
    }

    /// Formats the row. Inputs are abbreviated: without the scope if it is the same, without the prefix of the same
    /// decoder layer.
    fn line(&self) -> String {
        let own = layer_number(&self.scope);
        let local = |input: &String| match input.split_once('/') {
            Some((scope, name)) if scope == self.scope => name.to_owned(),
            _ => inner(input, own).to_owned(),
        };
        let inputs: Vec<String> = self.inputs.iter().map(local).collect();
        let named: Vec<&str> = self.named.iter().map(|name| inner(name, own)).collect();
        let arrow = if named.is_empty() { String::new() } else { format!(" → {}", named.join(", ")) };
        let Row { name, kind, types, .. } = self;
        let line = format!("    {name:<12} {kind:<16} {types:<24} {}{arrow}", inputs.join(", "));
        line.trim_end().to_owned()
    }
}

/// Splits `name: type`.
fn split(text: &str) -> (&str, &str) {
    text.rsplit_once(": ").unwrap_or((text, ""))
}

/// Layer index: 3 for `layers.3.mlp.up`.
fn layer_number(scope: &str) -> Option<usize> {
    scope.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// Strips the prefixes of the checkpoint (`model.`) and of the decoder layer `own`.
fn inner(name: &str, own: Option<usize>) -> &str {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let prefix = own.map(|layer| format!("layers.{layer}."));
    prefix.and_then(|prefix| name.strip_prefix(&prefix)).unwrap_or(name)
}

/// Lines of one decoder layer, or of the part before or after the layers.
struct LayerGroup {
    layer: Option<usize>,
    lines: Vec<String>,
}

impl LayerGroup {
    /// Returns true if the groups differ only in their layer number: each reads the preceding layer, or both the same
    /// one.
    fn is_alike(&self, other: &LayerGroup) -> bool {
        let (Some(layer), Some(of)) = (self.layer, other.layer) else { return false };
        let before = |layer: usize| format!("layers.{}.", layer.wrapping_sub(1));
        let moved = |line: &str| line.replace(&before(layer), &before(of));
        let alike = |(line, of): (&String, &String)| line == of || moved(line) == *of;
        self.lines.len() == other.lines.len() && self.lines.iter().zip(&other.lines).all(alike)
    }
}

fn blocks(layers: &[Layer]) -> Vec<LayerGroup> {
    let mut blocks: Vec<LayerGroup> = Vec::new();
    let mut scope = None;
    for row in layers.iter().map(Row::of) {
        let layer = layer_number(&row.scope);
        if blocks.last().is_none_or(|block| block.layer != layer) {
            blocks.push(LayerGroup { layer, lines: Vec::new() });
        }
        if let Some(block) = blocks.last_mut() {
            if scope.as_ref() != Some(&row.scope) {
                block.lines.push(format!("  {}", inner(&row.scope, layer)));
            }
            block.lines.push(row.line());
        }
        scope = Some(row.scope);
    }
    blocks
}

/// Writes the groups; decoder layers that differ only in their number are written once.
fn write_blocks(f: &mut fmt::Formatter<'_>, blocks: &[LayerGroup], detail: ListingDetail) -> fmt::Result {
    let mut index = 0;
    while let Some(block) = blocks.get(index) {
        let alike = |other: &&LayerGroup| detail == ListingDetail::Once && block.is_alike(other);
        let repeated = blocks[index + 1..].iter().take_while(alike).count();
        match (block.layer, repeated) {
            (Some(layer), 0) => writeln!(f, "\nlayer {layer}")?,
            (Some(layer), _) => {
                writeln!(f, "\nlayers {layer} to {}, all alike; names are those of layer {layer}", layer + repeated)?
            }
            (None, _) if index == 0 => writeln!(f, "\nbefore the layers")?,
            (None, _) => writeln!(f, "\nafter the layers")?,
        }
        writeln!(f, "{}", block.lines.join("\n"))?;
        index += 1 + repeated;
    }
    Ok(())
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.layers.len();
        writeln!(f, "{}: {count} layers, as TensorRT reports them", self.title)?;
        writeln!(
            f,
            "Columns: number and operation, TensorRT's layer type, result type (-1 is a dynamic dimension), inputs, and →"
        )?;
        writeln!(f, "the name of a network output. Within a layer, names omit its `layers.N.` prefix.")?;
        writeln!(f, "\nstep inputs")?;
        let mut caches = 0;
        for binding in self.bindings.iter().filter(|binding| !binding.role.is_output()) {
            match binding.role {
                BindingRole::Weight => continue,
                BindingRole::KeyCache(layer) | BindingRole::ValueCache(layer)
                    if layer > 0 && self.detail == ListingDetail::Once =>
                {
                    caches += 1;
                    continue;
                }
                _ => writeln!(f, "  {binding}")?,
            }
        }
        if caches > 0 {
            writeln!(f, "  ({caches} more caches of the other layers)")?;
        }
        writeln!(f, "\nweight inputs")?;
        let layers_of = |name: &str| {
            let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "L" } else { part });
            parts.collect::<Vec<&str>>().join(".")
        };
        let mut seen: Vec<(String, usize, &Binding)> = Vec::new();
        let mut at: HashMap<String, usize> = HashMap::new();
        for binding in self.bindings.iter().filter(|binding| binding.role == BindingRole::Weight) {
            let text = binding.to_string();
            let ty = split(&text).1;
            let name = match self.detail {
                ListingDetail::Once => layers_of(&binding.name),
                ListingDetail::All => binding.name.clone(),
            };
            let index = *at.entry(format!("{name}: {ty}")).or_insert_with(|| {
                seen.push((format!("{name}: {ty}"), 0, binding));
                seen.len() - 1
            });
            if let Some((_, count, _)) = seen.get_mut(index) {
                *count += 1;
            }
        }
        for (text, count, binding) in &seen {
            match count {
                1 => writeln!(f, "  {binding}")?,
                _ => writeln!(f, "  {text}  × {count}")?,
            }
        }
        write_blocks(f, &blocks(&self.layers), self.detail)?;
        let Some(context_plan) = &self.context_plan else { return Ok(()) };
        writeln!(f, "\ncontext plan: {} layers, identical except for these", context_plan.len())?;
        let others: Vec<Layer> = context_plan.iter().filter(|layer| !self.layers.contains(layer)).cloned().collect();
        write_blocks(f, &blocks(&others), self.detail)
    }
}

impl Networks {
    pub fn json(self) -> Value {
        let layers = |layers: &[Layer]| -> Vec<Value> {
            let layer = |l: &Layer| json!({"name": l.name, "kind": l.kind, "inputs": l.inputs, "outputs": l.outputs});
            layers.iter().map(layer).collect()
        };
        json!({
            "bindings": self.bindings,
            "layers": layers(&self.layers),
            "context_layers": self.context_plan.as_deref().map(layers),
        })
    }
}
