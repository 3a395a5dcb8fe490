//! `--network`: what TensorRT is given, as it reads it back.

use std::collections::HashMap;
use std::fmt;

use aotron::backend::tensorrt::Layer;
use aotron::engine::tensorrt::{Binding, BindingRole};
use serde_json::{Value, json};

use super::tensorrt::ListingDetail;

/// The network of a plan, and that of the plan for first chunks.
pub struct Networks {
    pub title: String,
    pub bindings: Vec<Binding>,
    pub layers: Vec<Layer>,
    pub context_plan: Option<Vec<Layer>>,
    pub extent: ListingDetail,
}

/// A layer in columns.
struct Row {
    /// The op of the graph that it was lowered from.
    scope: String,
    /// Its number and operation there.
    name: String,
    kind: String,
    /// Of its results.
    types: String,
    /// Results that have names of their own: outputs of the network.
    named: Vec<String>,
    inputs: Vec<String>,
}

impl Row {
    fn of(layer: &Layer) -> Row {
        let (scope, name) = layer.name.split_once('/').unwrap_or(("", &layer.name));
        // TensorRT makes two layers of an attention and names them itself; their kinds tell them apart.
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

    /// With what it reads of its own scope by its name there, and of its own decoder layer without that layer's.
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

/// `name: type`.
fn split(text: &str) -> (&str, &str) {
    text.rsplit_once(": ").unwrap_or((text, ""))
}

/// 3 of `layers.3.mlp.up`.
fn layer_number(scope: &str) -> Option<usize> {
    scope.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// A name without the decoder layer `own` and the checkpoint's `model`.
fn inner(name: &str, own: Option<usize>) -> &str {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let prefix = own.map(|layer| format!("layers.{layer}."));
    prefix.and_then(|prefix| name.strip_prefix(&prefix)).unwrap_or(name)
}

/// Lines of one decoder layer, or of what is between.
struct LayerGroup {
    layer: Option<usize>,
    lines: Vec<String>,
}

impl LayerGroup {
    /// Whether it differs in nothing but its number: what it reads of the layer before, or of one that both read.
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

/// Decoder layers that differ in nothing but their number are written once.
fn write_blocks(f: &mut fmt::Formatter<'_>, blocks: &[LayerGroup], extent: ListingDetail) -> fmt::Result {
    let mut index = 0;
    while let Some(block) = blocks.get(index) {
        let alike = |other: &&LayerGroup| extent == ListingDetail::Once && block.is_alike(other);
        let repeated = blocks[index + 1..].iter().take_while(alike).count();
        match (block.layer, repeated) {
            (Some(layer), 0) => writeln!(f, "\nlayer {layer}")?,
            (Some(layer), _) => {
                writeln!(f, "\nlayers {layer} to {}, all alike; names are of {layer}", layer + repeated)?
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
        writeln!(f, "{}: {count} layers, as TensorRT reads them back", self.title)?;
        writeln!(
            f,
            "By line: number and operation, TensorRT's kind, type of the result (a step decides the sizes that are"
        )?;
        writeln!(f, "-1), what it reads, and → the name of an output. In a layer, names are without its `layers.N.`.")?;
        writeln!(f, "\ninputs of a step")?;
        let mut caches = 0;
        for binding in self.bindings.iter().filter(|binding| !binding.role.is_output()) {
            match binding.role {
                BindingRole::Weight => continue,
                BindingRole::KeyCache(layer) | BindingRole::ValueCache(layer)
                    if layer > 0 && self.extent == ListingDetail::Once =>
                {
                    caches += 1;
                    continue;
                }
                _ => writeln!(f, "  {binding}")?,
            }
        }
        if caches > 0 {
            writeln!(f, "  ({caches} more caches, of the other layers)")?;
        }
        writeln!(f, "\nweights that are inputs")?;
        let layers_of = |name: &str| {
            let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "L" } else { part });
            parts.collect::<Vec<&str>>().join(".")
        };
        let mut seen: Vec<(String, usize, &Binding)> = Vec::new();
        let mut at: HashMap<String, usize> = HashMap::new();
        for binding in self.bindings.iter().filter(|binding| binding.role == BindingRole::Weight) {
            let text = binding.to_string();
            let ty = split(&text).1;
            let name = match self.extent {
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
        write_blocks(f, &blocks(&self.layers), self.extent)?;
        let Some(context_plan) = &self.context_plan else { return Ok(()) };
        let title = "plan for first chunks";
        writeln!(f, "\n{title}: {} layers, the same but for these", context_plan.len())?;
        let others: Vec<Layer> = context_plan.iter().filter(|layer| !self.layers.contains(layer)).cloned().collect();
        write_blocks(f, &blocks(&others), self.extent)
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
            "first_chunk_layers": self.context_plan.as_deref().map(layers),
        })
    }
}
