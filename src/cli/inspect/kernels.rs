//! `--kernels`: the kernels a compiled plan launches, and their cost.

use std::fmt;

use aotron::backend::tensorrt::analysis::{Copied, Fp8Products, GPUS, KernelLocation, StepKernels, Traffic};
use aotron::backend::tensorrt::kernels::{GpuKernel, KernelKind, KernelTensor};
use aotron::compile::gpu::sm;
use aotron::engine::tensorrt::{AttentionInput, Binding, BindingRole, Fp8Weights, Sizes};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::tensorrt::ListingDetail;
use super::term;

/// Widths of the table's columns, 100 characters with the spaces between them.
const COLUMNS: [usize; 4] = [9, 19, 41, 26];

/// The kernels of all kinds of steps.
pub struct Listing {
    pub target: &'static str,
    pub precision: String,
    pub library: String,
    /// Compute capability of the target.
    pub compute_capability: u16,
    /// Compute capability that the plan was compiled for.
    pub compiled_for: u16,
    /// Capacity of the class that is listed.
    pub capacity_tokens: usize,
    /// Sizes of all capacity classes, ascending.
    pub classes: Vec<Sizes>,
    /// Bytes of weights embedded in the plan.
    pub weight_bytes_in_plan: u64,
    /// Input by which the plan that reads the cache learns which keys to attend to.
    pub attention: AttentionInput,
    /// Plans for whose attention TensorRT has no fused kernel, and its words.
    pub in_parts: Vec<(&'static str, String)>,
    pub bindings: Vec<Binding>,
    pub steps: Vec<StepListing>,
    pub traffic: Traffic,
    /// Products of decoding with weights in E4M3.
    pub fp8_products: Fp8Products,
    /// The way that weights in E4M3 are held.
    pub fp8_weights: Fp8Weights,
    /// Log lines that could not be parsed.
    pub unread: Vec<String>,
    pub detail: ListingDetail,
}

/// The kernels of one kind of step.
#[derive(Serialize)]
pub struct StepListing {
    pub name: &'static str,
    pub analysis: StepKernels,
    pub kernels: Vec<GpuKernel>,
}

impl StepListing {
    /// Launches per layer: `8`, or `8 to 9`.
    fn layer_launches(&self) -> String {
        match self.analysis.layer_launches() {
            Some((fewest, most)) if fewest == most => fewest.to_string(),
            Some((fewest, most)) => format!("{fewest} to {most}"),
            None => "none".into(),
        }
    }

    /// Layers with equal signatures count as alike: the same kernels of the same types in the same order.
    fn signature(&self, layer: usize) -> Vec<Likeness<'_>> {
        self.analysis.layer(layer, &self.kernels).map(likeness).collect()
    }

    /// The most common kind of layer: its first layer, and all layers like it.
    fn most_alike(&self) -> Option<(usize, Vec<usize>)> {
        let layers = self.analysis.by_layer.len();
        let signatures: Vec<_> = (0..layers).map(|layer| self.signature(layer)).collect();
        let like = |layer: usize| -> Vec<usize> {
            (0..layers).filter(|other| signatures[*other] == signatures[layer]).collect()
        };
        (0..layers).map(|layer| (layer, like(layer))).rev().max_by_key(|(_, alike)| alike.len())
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, bindings: &[Binding], detail: ListingDetail) -> fmt::Result {
        let StepKernels { launches, by_layer, .. } = &self.analysis;
        let (layers, around) = (by_layer.len(), launches - by_layer.iter().sum::<usize>());
        let each = self.layer_launches();
        let layers_text = term::plural(layers, "layer");
        writeln!(f, "{}: {launches} kernels, {each} in each of {layers_text}, {around} around them", self.name)?;
        let placed: Vec<(&GpuKernel, KernelLocation)> =
            self.kernels.iter().zip(self.analysis.places.iter().copied()).filter(|(k, _)| k.is_launched()).collect();
        if detail == ListingDetail::All {
            let mut place = None;
            for (kernel, at) in placed {
                if place != Some(at) {
                    match at {
                        KernelLocation::Before => writeln!(f, " before the layers")?,
                        KernelLocation::Layer(layer) => writeln!(f, " layer {layer}")?,
                        KernelLocation::After => writeln!(f, " after the layers")?,
                    }
                }
                place = Some(at);
                write_kernel(f, kernel, bindings)?;
            }
            return writeln!(f);
        }
        let Some((layer, alike)) = self.most_alike() else { return writeln!(f) };
        let others = match layers - alike.len() {
            0 => String::new(),
            1 => "; 1 other differs (--kernels=all prints it)".to_owned(),
            n => format!("; {n} others differ (--kernels=all prints them)"),
        };
        match (alike.len(), alike.last()) {
            (1, _) | (_, None) => writeln!(f, " layer {layer}{others}")?,
            (n, Some(last)) => writeln!(f, " layers {layer} to {last}, × {n}{others}")?,
        }
        self.analysis.layer(layer, &self.kernels).try_for_each(|kernel| write_kernel(f, kernel, bindings))?;
        writeln!(f)
    }
}

/// Kind, operations and output types of a kernel.
type Likeness<'a> = (KernelKind, Vec<&'a str>, Vec<String>);

fn likeness(kernel: &GpuKernel) -> Likeness<'_> {
    let mut types: Vec<String> = kernel.outputs.iter().map(KernelTensor::ty).collect();
    types.sort_unstable();
    (kernel.kind, kernel.operations(), types)
}

/// Name of a weight or cache without the prefix of its layer.
fn short(name: &str) -> &str {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let Some(rest) = name.strip_prefix("layers.") else { return name };
    rest.split_once('.').map_or(name, |(_, name)| name)
}

/// Lists bindings by name (weights with their shape) and intermediate values by type, each once, bindings first.
fn items(tensors: &[KernelTensor], bindings: &[Binding]) -> Vec<String> {
    let mut seen: Vec<&str> = Vec::new();
    let (mut bound, mut inside): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for tensor in tensors {
        if seen.contains(&tensor.name.as_str()) {
            continue;
        }
        seen.push(&tensor.name);
        match bindings.iter().find(|binding| binding.name == tensor.name).map(|binding| binding.role) {
            Some(BindingRole::Weight) if tensor.dims.len() > 1 => {
                let ty = tensor.ty();
                let dims = ty.find('[').map_or("", |at| &ty[at..]);
                bound.push(format!("{}{dims}", short(&tensor.name)));
            }
            Some(_) => bound.push(short(&tensor.name).to_owned()),
            None => inside.push(tensor.ty()),
        }
    }
    // TensorRT's order differs from build to build.
    bound.sort_unstable();
    bound.append(&mut inside);
    bound
}

/// Wraps a comma-separated list of items to lines of `width`.
fn wrapped(items: &[String], width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for (index, item) in items.iter().enumerate() {
        let comma = if index + 1 < items.len() { "," } else { "" };
        let Some(line) = lines.last_mut() else { break };
        match line.chars().count() {
            0 => *line = format!("{item}{comma}"),
            used if used + 1 + item.chars().count() + comma.len() <= width => {
                line.push(' ');
                line.push_str(item);
                line.push_str(comma);
            }
            _ => lines.push(format!("{item}{comma}")),
        }
    }
    lines
}

/// A kernel's operations in TensorRT's abbreviations, truncated to the column.
fn operations(kernel: &GpuKernel) -> String {
    let operations = kernel.operations();
    let text = match (operations.is_empty(), kernel.layer_type.as_str()) {
        (false, _) => operations.join(" "),
        (true, "gemm") => "gemm".to_owned(),
        (true, _) => kernel.name.trim_matches('_').to_owned(),
    };
    match text.chars().count() > COLUMNS[1] {
        true => text.chars().take(COLUMNS[1] - 1).chain(['…']).collect(),
        false => text,
    }
}

fn write_kernel(f: &mut fmt::Formatter<'_>, kernel: &GpuKernel, bindings: &[Binding]) -> fmt::Result {
    let mut read = items(&kernel.inputs, bindings);
    let codes = kernel.constants.iter().filter(|constant| constant.dims.iter().filter(|n| **n != 1).count() >= 2);
    read.extend(codes.map(|constant| format!("{} in the plan", constant.ty())));
    let read = wrapped(&read, COLUMNS[2]);
    let written = wrapped(&items(&kernel.outputs, bindings), COLUMNS[3]);
    for line in 0..read.len().max(written.len()) {
        let (kind, what) = match line {
            0 => (kernel.kind.to_string(), operations(kernel)),
            _ => (String::new(), String::new()),
        };
        let cell = |lines: &[String]| lines.get(line).cloned().unwrap_or_default();
        let [a, b, c, _] = COLUMNS;
        let text = format!("  {kind:<a$} {what:<b$} {:<c$} {}", cell(&read), cell(&written));
        writeln!(f, "{}", text.trim_end())?;
    }
    Ok(())
}

impl Listing {
    fn title(&self) -> String {
        let compiled = format!("compiled for SM {} by {}", sm(self.compiled_for), self.library);
        let stands_in = match self.compute_capability == self.compiled_for {
            true => String::new(),
            false => format!(
                "\nTensorRT for RTX cannot compile for the target's SM {}; there, TensorRT 11 may choose other kernels.",
                sm(self.compute_capability)
            ),
        };
        let in_parts: String = self
            .in_parts
            .iter()
            .map(|(plan, reason)| {
                format!("\nno fused attention: {plan} computes it in parts, which is slower ({reason})")
            })
            .collect();
        let (target, precision, attention) = (self.target, &self.precision, self.attention);
        let class = match self.classes.len() {
            1 => String::new(),
            _ => format!(", class {}", self.capacity_tokens),
        };
        format!("kernels for {target} in {precision}, attention by {attention}{class}, {compiled}{stands_in}{in_parts}")
    }

    /// One sequence, and as many as the class's plan decodes together, for each class.
    fn situations(&self) -> impl Iterator<Item = (usize, usize)> {
        self.classes.iter().flat_map(|sizes| {
            let both = [1, sizes.decode_sequences];
            let one = both.into_iter().take(if sizes.decode_sequences > 1 { 2 } else { 1 });
            one.map(|sequences| (sequences, sizes.max_sequence_tokens))
        })
    }

    fn write_copies(
        &self,
        f: &mut fmt::Formatter<'_>,
        step: &StepListing,
        what: &str,
        copies: &[Copied],
    ) -> fmt::Result {
        let Some(first) = copies.first() else { return Ok(()) };
        let kernel = step.kernels.get(first.kernel).map(operations).unwrap_or_default();
        let of = first.of.as_deref().map(|of| format!(" of {of}")).unwrap_or_default();
        writeln!(f, "  {} copies a {what}: `{kernel}`{of} as {}; {} in all", step.name, first.what, copies.len())
    }

    /// Prints how many products of decoding are in FP8, and which convert their weights to a wider type first.
    fn write_fp8_products(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fp8Products { layers, in_fp8, widened } = &self.fp8_products;
        if *layers == 0 {
            return Ok(());
        }
        writeln!(f, "fp8 products: {in_fp8} of {layers}, with weights as {}", self.fp8_weights)?;
        if let Some(first) = widened.first() {
            let rest = match widened.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            writeln!(f, "  dequantized first: {first}{rest}")?;
        }
        match self.fp8_products.untold() {
            0 => {}
            n => writeln!(f, "  {} whose kernel's name does not tell", term::plural(n, "product"))?,
        }
        if self.compute_capability != self.compiled_for {
            writeln!(
                f,
                "  as compiled for SM {}; what the target's own compiler chooses, this does not tell",
                sm(self.compiled_for)
            )?;
        }
        Ok(())
    }

    fn write_analysis(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide = 16;
        writeln!(
            f,
            "{:<wide$}{:>9}{:>12}{:>15}{:>14}",
            "step", "kernels", "per layer", "weight copies", "cache copies"
        )?;
        for step in &self.steps {
            let StepKernels { launches, weight_copies, cache_copies, .. } = &step.analysis;
            let (weights, caches) = (weight_copies.len(), cache_copies.len());
            writeln!(f, "{:<wide$}{launches:>9}{:>12}{weights:>15}{caches:>14}", step.name, step.layer_launches())?;
        }
        for step in &self.steps {
            self.write_copies(f, step, "weight", &step.analysis.weight_copies)?;
            self.write_copies(f, step, "cache", &step.analysis.cache_copies)?;
        }
        self.write_fp8_products(f)?;
        if !self.unread.is_empty() {
            let lines = term::plural(self.unread.len(), "line");
            writeln!(f, "{lines} of TensorRT's list could not be parsed and are not counted (see --format json)")?;
        }
        let Traffic { weight_bytes, row_bytes, kv_bytes_per_token } = self.traffic;
        writeln!(f, "\ndecoding one token of each sequence reads at least")?;
        let in_plan = match self.weight_bytes_in_plan {
            0 => String::new(),
            bytes => format!(", {} of them embedded in the plan", term::bytes(bytes)),
        };
        writeln!(f, "  {:>10}  of weights, once{in_plan}", term::bytes(weight_bytes))?;
        writeln!(f, "  {:>10}  of table rows per sequence", term::bytes(row_bytes))?;
        let per = match self.attention {
            AttentionInput::Mask => "position of each sequence's cache, used or not",
            AttentionInput::Lengths => "token of each sequence",
        };
        writeln!(f, "  {:>10}  of keys and values per {per}", term::bytes(kv_bytes_per_token))?;
        writeln!(
            f,
            "\nso memory bandwidth bounds decoding to (minimum step time, maximum tokens/s over all sequences)"
        )?;
        let gpus = || GPUS.iter().filter(|gpu| self.precision != "fp8" || gpu.compute_capability >= 89);
        write!(f, "  {:<29}{:>10}", "", "reads")?;
        gpus().try_for_each(|gpu| write!(f, "{:>20}", gpu.name))?;
        write!(f, "\n  {:<38}", "")?;
        gpus().try_for_each(|gpu| write!(f, "{:>20}", format!("{} GB/s", gpu.bytes_per_second / 1_000_000_000)))?;
        writeln!(f)?;
        for (sequences, tokens) in self.situations() {
            let bytes = self.traffic.decode_bytes(sequences, tokens);
            let what = format!("{} in class {tokens}", term::plural(sequences, "sequence"));
            write!(f, "  {what:<29}{:>10}", term::bytes(bytes))?;
            for gpu in gpus() {
                let seconds = gpu.seconds(bytes);
                let rate = rounded(sequences as f64 / seconds);
                write!(f, "{:>20}", format!("{} {rate:>8}", time(seconds)))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s => format!("{:.1} ms", s * 1e3),
    }
}

/// Rounds to three significant digits.
fn rounded(rate: f64) -> String {
    match rate {
        r if r < 9.995 => format!("{r:.2}"),
        r if r < 99.95 => format!("{r:.1}"),
        r => format!("{r:.0}"),
    }
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.title())?;
        let [a, b, c, _] = COLUMNS;
        writeln!(f, "  {:<a$} {:<b$} {:<c$} writes", "kind", "operations", "reads")?;
        // By default, cached prefill is listed only if there is no context prefill; the summary always has it.
        let shown = if self.detail == ListingDetail::All { self.steps.len() } else { 2 };
        self.steps.iter().take(shown).try_for_each(|step| step.write(f, &self.bindings, self.detail))?;
        self.write_analysis(f)
    }
}

impl Serialize for Listing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let decode: Vec<Value> = self
            .situations()
            .flat_map(|(sequences, tokens)| GPUS.into_iter().map(move |gpu| (sequences, tokens, gpu)))
            .map(|(sequences, tokens, gpu)| {
                let bytes = self.traffic.decode_bytes(sequences, tokens);
                let seconds = gpu.seconds(bytes);
                json!({
                    "gpu": gpu, "sequences": sequences, "tokens": tokens, "bytes": bytes,
                    "least_seconds": seconds, "most_tokens_per_second": sequences as f64 / seconds,
                })
            })
            .collect();
        json!({
            "target": self.target,
            "precision": self.precision,
            "library": self.library,
            "compute_capability": self.compute_capability,
            "compiled_for": self.compiled_for,
            "weight_bytes_in_plan": self.weight_bytes_in_plan,
            "attention": self.attention,
            "capacity_tokens": self.capacity_tokens,
            "classes": self.classes,
            "attention_in_parts": self.in_parts,
            "traffic": self.traffic,
            "fp8_products": self.fp8_products,
            "fp8_weights": self.fp8_weights,
            "decode": decode,
            "steps": self.steps,
            "unread": self.unread,
        })
        .serialize(serializer)
    }
}
