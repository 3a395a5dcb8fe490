//! `--network`: what TensorRT is given, as it reads it back.

use std::collections::HashMap;
use std::fmt;

use aotron::backend::tensorrt::Layer;
use aotron::engine::tensorrt::{Binding, Role};
use serde_json::{Value, json};

use super::tensorrt::Extent;

/// The network of a plan, and that of the plan for first chunks.
pub struct Networks {
    pub title: String,
    pub bindings: Vec<Binding>,
    pub layers: Vec<Layer>,
    pub first_chunk: Option<Vec<Layer>>,
    pub extent: Extent,
}

/// A layer in columns.
struct Row {
    /// The op of the graph that it was lowered from.
    scope: String,
    /// Its number and operation there.
    name: String,
    kind: String,
    outputs: String,
    inputs: Vec<String>,
}

impl Row {
    fn of(layer: &Layer) -> Row {
        let (scope, name) = layer.name.split_once('/').unwrap_or(("", &layer.name));
        let output = |text: &String| {
            let (output, ty) = split(text);
            // A value that has a name of its own is an output of the network.
            let own = output != layer.name && !output.starts_with(&format!("{}_", layer.name));
            if own { format!("{ty} {output}") } else { ty.to_owned() }
        };
        Row {
            scope: scope.to_owned(),
            name: name.to_owned(),
            kind: layer.kind.clone(),
            outputs: layer.outputs.iter().map(output).collect::<Vec<String>>().join(", "),
            inputs: layer.inputs.iter().map(|text| split(text).0.to_owned()).collect(),
        }
    }

    /// With what it reads of its own scope by its name there.
    fn line(&self) -> String {
        let local = |input: &String| match input.split_once('/') {
            Some((scope, name)) if scope == self.scope => name.to_owned(),
            _ => input.clone(),
        };
        let inputs: Vec<String> = self.inputs.iter().map(local).collect();
        let line = format!("  {:<13} {:<16} {:<24} {}", self.name, self.kind, self.outputs, inputs.join(", "));
        line.trim_end().to_owned()
    }
}

/// `name: type`.
fn split(text: &str) -> (&str, &str) {
    text.rsplit_once(": ").unwrap_or((text, ""))
}

/// The number of the decoder layer in a name, and the name with `layers.L` in its stead, `layers.L-1` for the layer
/// before `of`.
fn numbered(text: &str, of: usize) -> String {
    let mut text = text.replace(&format!("layers.{of}."), "layers.L.");
    if let Some(before) = of.checked_sub(1) {
        text = text.replace(&format!("layers.{before}."), "layers.L-1.");
    }
    text
}

fn layer_number(scope: &str) -> Option<usize> {
    scope.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// Lines of one decoder layer, or of what is between.
struct Block {
    layer: Option<usize>,
    lines: Vec<String>,
}

fn blocks(layers: &[Layer]) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut scope = None;
    for row in layers.iter().map(Row::of) {
        let layer = layer_number(&row.scope);
        if blocks.last().is_none_or(|block| block.layer != layer) {
            blocks.push(Block { layer, lines: Vec::new() });
        }
        if let Some(block) = blocks.last_mut() {
            if scope.as_ref() != Some(&row.scope) {
                block.lines.push(row.scope.clone());
            }
            block.lines.push(row.line());
        }
        scope = Some(row.scope);
    }
    blocks
}

/// Decoder layers that differ in nothing but their number are written once.
fn write_blocks(f: &mut fmt::Formatter<'_>, blocks: &[Block], extent: Extent) -> fmt::Result {
    let text = |block: &Block| {
        let lines = block.lines.join("\n");
        block.layer.map_or(lines.clone(), |layer| numbered(&lines, layer))
    };
    let mut index = 0;
    while let Some(block) = blocks.get(index) {
        writeln!(f, "{}", block.lines.join("\n"))?;
        let alike = |other: &&Block| other.layer.is_some() && text(other) == text(block);
        let repeated = match extent {
            Extent::Once => blocks[index + 1..].iter().take_while(alike).count(),
            Extent::All => 0,
        };
        if let (Some(layer), true) = (block.layer, repeated > 0) {
            let last = layer + repeated;
            let which = if repeated == 1 { format!("layer {last}") } else { format!("layers {} to {last}", layer + 1) };
            writeln!(f, "({which}: as layer {layer})")?;
        }
        index += 1 + repeated;
    }
    Ok(())
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.layers.len();
        writeln!(f, "{}: {count} layers, as TensorRT reads them back", self.title)?;
        writeln!(f, "layer, kind, type of its result (-1 is the step's to say), what it reads")?;
        writeln!(f, "\ninputs, weights apart")?;
        let mut caches = 0;
        for binding in self.bindings.iter().filter(|binding| !binding.role.is_output()) {
            match binding.role {
                Role::Weight => continue,
                Role::KeyCache(layer) | Role::ValueCache(layer) if layer > 0 && self.extent == Extent::Once => {
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
        for binding in self.bindings.iter().filter(|binding| binding.role == Role::Weight) {
            let text = binding.to_string();
            let ty = split(&text).1;
            let name = match self.extent {
                Extent::Once => layers_of(&binding.name),
                Extent::All => binding.name.clone(),
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
        writeln!(f)?;
        write_blocks(f, &blocks(&self.layers), self.extent)?;
        let Some(first_chunk) = &self.first_chunk else { return Ok(()) };
        let title = "plan for first chunks";
        writeln!(f, "\n{title}: {} layers, the same but for these", first_chunk.len())?;
        let others: Vec<Layer> = first_chunk.iter().filter(|layer| !self.layers.contains(layer)).cloned().collect();
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
            "first_chunk_layers": self.first_chunk.as_deref().map(layers),
        })
    }
}
