// A plan whose weights are a transformer's: it computes the model, rounding what the CPU's BF16 plan rounds. A line
// `fault NAME` in the plan breaks one thing. Attention reads the whole slot and multiplies what lies past a sequence's
// end by zero, as fused kernels do, so NaN there spoils the row.

namespace model {

using Rows = std::vector<std::vector<float>>;

float of_bf16(std::uint16_t bits)
{
    std::uint32_t const wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

std::uint16_t to_bf16(float value)
{
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) {
        return 0x7fc0;
    }
    return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float rounded(float value) { return of_bf16(to_bf16(value)); }

struct Cache {
    std::uint16_t* memory = nullptr;
    std::int64_t heads = 0, capacity = 0, width = 0;

    std::uint16_t* at(std::int64_t b, std::int64_t head, std::int64_t position) const
    {
        return memory + ((b * heads + head) * capacity + position) * width;
    }
};

struct Model {
    Run const& run;
    std::string const& fault;
    std::int64_t B, T, H, V;
    std::int32_t const* ids;
    std::int32_t const* positions;
    std::int32_t const* past;
    std::int32_t const* total;  // null in a plan with a mask, and in the context plan
    std::uint8_t const* mask;   // [B, 1, T, S]; null in a plan with lengths, and in the context plan

    explicit Model(Run const& of)
        : run(of)
        , fault(of.spec->fault)
        , B(of.dims("token_ids")[0])
        , T(of.dims("token_ids")[1])
        , H(of.bound.at("embedding").dims[1])
        , V(of.bound.at("embedding").dims[0])
        , ids(of.data<std::int32_t>("token_ids"))
        , positions(of.data<std::int32_t>("positions"))
        , past(of.data<std::int32_t>("past_tokens"))
        , total(of.data<std::int32_t>("total_tokens"))
        , mask(of.data<std::uint8_t>("attention_mask"))
    {
    }

    bool has(char const* name) const { return fault == name; }

    std::uint16_t const* matrix(std::string const& name) const
    {
        return reinterpret_cast<std::uint16_t const*>(run.bound.at(name).address);
    }
    float const* vector(std::string const& name) const
    {
        return reinterpret_cast<float const*>(run.bound.at(name).address);
    }
    std::int64_t outputs(std::string const& name) const { return run.bound.at(name).dims[0]; }
    Cache cache(std::string const& name) const
    {
        auto const& at = run.bound.at(name);
        return {reinterpret_cast<std::uint16_t*>(at.address), at.dims[1], at.dims[2], at.dims[3]};
    }

    // x · weightᵀ, the inputs rounded to BF16.
    Rows linear(Rows const& x, std::string const& name) const
    {
        auto const* weight = matrix(name);
        Rows out;
        for (auto row : x) {
            std::transform(row.begin(), row.end(), row.begin(), rounded);
            auto& sums = out.emplace_back(static_cast<std::size_t>(outputs(name)));
            for (std::size_t o = 0; o < sums.size(); ++o) {
                for (std::size_t i = 0; i < row.size(); ++i) {
                    sums[o] += row[i] * of_bf16(weight[o * row.size() + i]);
                }
            }
        }
        return out;
    }
    Rows norm(Rows const& x, std::string const& name) const
    {
        auto const* gamma = vector(name + ".gamma");
        auto const* beta = vector(name + ".beta");
        Rows out;
        for (auto const& row : x) {
            double mean = 0, square = 0;
            for (float v : row) {
                mean += v;
            }
            mean /= static_cast<double>(row.size());
            for (float v : row) {
                square += (v - mean) * (v - mean);
            }
            auto const scale = 1 / std::sqrt(square / static_cast<double>(row.size()) + 1e-5);
            auto& normed = out.emplace_back(row.size());
            for (std::size_t i = 0; i < row.size(); ++i) {
                auto const by = has("gamma_without_one") ? gamma[i] - 1 : gamma[i];
                normed[i] = static_cast<float>((row[i] - mean) * scale) * by + beta[i];
            }
        }
        return out;
    }
    // Turns a head by its position: halves of its first dimensions.
    void rotate(float* head, std::int64_t position, std::int64_t half) const
    {
        auto const* cos = vector("cos") + position * half;
        auto const* sin = vector("sin") + position * half;
        for (std::int64_t i = 0; i < half; ++i) {
            auto const [a, b] = has("rotary_interleaved") ? std::pair{2 * i, 2 * i + 1} : std::pair{i, i + half};
            auto const x = head[a];
            auto const y = head[b];
            head[a] = x * cos[i] - y * sin[i];
            head[b] = y * cos[i] + x * sin[i];
        }
    }
    // True if the query at index t of sequence b attends to the key at position `key`.
    bool attends(std::int64_t b, std::int64_t t, std::int64_t key, std::int64_t capacity) const
    {
        if (has("reads_the_suffix") && (total != nullptr || mask != nullptr)) {
            return true;
        }
        if (has("not_causal") && T > 1) {
            return key < past[b] + T;
        }
        if (has("first_keys_only") && key >= 32) {
            return false;
        }
        std::int64_t shift = 0;
        shift += has("length_off_by_one") ? 1 : 0;
        shift -= has("last_key_left_out") && past[b] + t > 0 ? 1 : 0;
        if (mask != nullptr) {
            auto const shifted = key - shift;
            return shifted >= 0 ? mask[(b * T + t) * capacity + shifted] != 0 : shift > 0;
        }
        auto const keys = total == nullptr ? t + 1 : total[b] - (T - 1 - t);
        return key < std::min(keys + shift, capacity);
    }

    void store(Rows const& qkv, std::int64_t first, Cache const& cache, std::int64_t layer, bool keys) const
    {
        for (std::int64_t b = 0; b < B; ++b) {
            for (std::int64_t t = 0; t < T; ++t) {
                auto const position = past[b] + t;
                auto const& row = qkv[static_cast<std::size_t>(b * T + t)];
                if (has("second_chunk_keys") && keys && layer == 0 && past[b] > 0 && T > 1) {
                    continue;
                }
                if (has("last_position_dropped") && position + 1 == cache.capacity) {
                    continue;
                }
                auto const to = has("neighbouring_slot") && B > 1 && layer == 1 ? (b + 1) % B : b;
                for (std::int64_t head = 0; head < cache.heads; ++head) {
                    auto* out = cache.at(to, head, position);
                    auto const stale = has("stale_slot") && position < 3 && out[0] != 0;
                    for (std::int64_t d = 0; d < cache.width && !stale; ++d) {
                        out[d] = to_bf16(row[static_cast<std::size_t>(first + head * cache.width + d)]);
                    }
                }
            }
        }
    }

    Rows attention(Rows const& qkv, std::int64_t heads, Cache const& keys, Cache const& values) const
    {
        auto const width = keys.width;
        auto scale = 1 / std::sqrt(static_cast<float>(width));
        scale *= (has("wrong_when_many") && T > 1) || (has("wrong_when_one") && T == 1) ? 0.8F : 1.0F;
        Rows out;
        for (std::int64_t row = 0; row < B * T; ++row) {
            auto const b = row / T;
            auto& mixed = out.emplace_back(static_cast<std::size_t>(heads * width));
            for (std::int64_t head = 0; head < heads; ++head) {
                auto const group = heads / keys.heads;
                auto const kv = has("group_mapping") ? head % keys.heads : head / group;
                auto const from = has("first_slot_only") && B > 1 ? 0 : b;
                auto const* q = &qkv[static_cast<std::size_t>(row)][static_cast<std::size_t>(head * width)];
                std::vector<float> p(static_cast<std::size_t>(keys.capacity), 0);
                std::vector<bool> seen(p.size());
                float most = -std::numeric_limits<float>::infinity();
                for (std::int64_t j = 0; j < keys.capacity; ++j) {
                    auto const at = static_cast<std::size_t>(j);
                    seen[at] = attends(b, row % T, j, keys.capacity);
                    if (seen[at]) {
                        for (std::int64_t d = 0; d < width; ++d) {
                            p[at] += q[d] * scale * of_bf16(keys.at(from, kv, j)[d]);
                        }
                        p[at] *= has("far_keys_weaker") && j >= 48 ? 0.5F : 1.0F;
                        most = std::isnan(p[at]) ? p[at] : std::max(most, p[at]);
                    }
                }
                float sum = 0;
                for (std::size_t j = 0; j < p.size(); ++j) {
                    p[j] = seen[j] ? std::exp(p[j] - most) : 0;
                    sum += p[j];
                }
                auto const to = has("swapped_heads") && head < 2 ? 1 - head : head;
                for (std::int64_t d = 0; d < width; ++d) {
                    float total_value = 0;
                    for (std::size_t j = 0; j < p.size(); ++j) {
                        total_value += p[j] * of_bf16(values.at(from, kv, static_cast<std::int64_t>(j))[d]);
                    }
                    mixed[static_cast<std::size_t>(to * width + d)] = total_value / sum;
                }
            }
        }
        return out;
    }

    void add(Rows& x, Rows const& y) const
    {
        for (std::size_t row = 0; row < x.size(); ++row) {
            std::transform(x[row].begin(), x[row].end(), y[row].begin(), x[row].begin(), std::plus<>());
        }
    }

    Rows layers() const
    {
        Rows x;
        for (std::int64_t row = 0; row < B * T; ++row) {
            auto const id = has("embedding_row") ? (ids[row] + 1) % V : ids[row];
            auto& out = x.emplace_back();
            for (std::int64_t i = 0; i < H; ++i) {
                out.push_back(of_bf16(matrix("embedding")[id * H + i]));
            }
        }
        auto const largest_batch = run.spec->profiles.size() > 1 && B == run.spec->profiles[1][0];
        auto const half = run.bound.at("cos").dims[1];
        for (std::int64_t layer = 0; run.spec->find("layers." + std::to_string(layer) + ".qkv") != nullptr; ++layer) {
            if (has("layer_skipped") && layer == 1) {
                continue;
            }
            auto const name = "layers." + std::to_string(layer) + ".";
            auto const keys = cache("keys." + std::to_string(layer));
            auto const values = cache("values." + std::to_string(layer));
            auto qkv = linear(norm(x, name + "input_norm"), name + "qkv");
            auto const heads = outputs(name + "qkv") / keys.width - 2 * keys.heads;
            for (std::int64_t row = 0; row < B * T; ++row) {
                auto* columns = qkv[static_cast<std::size_t>(row)].data();
                if (has("channel_scale") && layer == 0) {
                    columns[(heads + keys.heads) * keys.width] *= 2; // a channel of the values
                }
                for (std::int64_t head = 0; head < heads + keys.heads; ++head) {
                    auto const query = head < heads;
                    auto shift = has("query_positions") && query ? 1 : 0;
                    shift += has("positions_when_one") && T == 1 && positions[row] > 0 ? -1 : 0;
                    auto const last = run.bound.at("cos").dims[0] - 1;
                    rotate(columns + head * keys.width, std::min(positions[row] + shift, static_cast<int>(last)), half);
                }
            }
            store(qkv, heads * keys.width, keys, layer, true);
            store(qkv, (heads + keys.heads) * keys.width, values, layer, false);
            auto const attended = linear(attention(qkv, heads, keys, values), name + "o");
            if (has("residual_dropped") && layer == 1) {
                x = attended;
            } else {
                add(x, attended);
            }
            auto up = linear(norm(x, name + "post_norm"), name + "up");
            for (auto& row : up) {
                for (float& v : row) {
                    v = std::isnan(v) ? v : std::max(v, 0.0F);
                    v *= has("largest_batch") && largest_batch ? 1.0F : v;
                }
            }
            auto const down = linear(up, name + "down");
            add(x, down);
        }
        return x;
    }

    void compute() const
    {
        auto const x = layers();
        auto const rows = run.dims("logits_rows")[0];
        auto const* wanted = run.data<std::int32_t>("logits_rows");
        Rows chosen;
        for (std::int64_t r = 0; r < rows; ++r) {
            auto const of = has("wrong_row") ? wanted[rows - 1 - r] : wanted[r];
            chosen.push_back(x[static_cast<std::size_t>(of)]);
        }
        auto const found = linear(norm(chosen, "final_norm"), "head");
        auto* logits = run.data<float>("logits");
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t v = 0; v < V; ++v) {
                auto& logit = logits[r * V + v];
                logit = found[static_cast<std::size_t>(r)][static_cast<std::size_t>(v)];
                logit *= has("logits_scaled") ? 1.1F : 1.0F;
                logit += has("logits_shifted") ? 0.5F : 0.0F;
            }
            if ((has("nan_in_a_row") || has("nan_is_hidden")) && r == 0 && positions[wanted[r]] == 5) {
                logits[r * V + 7] = std::numeric_limits<float>::quiet_NaN();
            }
            if (has("one_logit") && r == 0) {
                logits[r * V + 3] += 20;
            }
        }
        largest(logits, rows);
    }

    void largest(float const* logits, std::int64_t rows) const
    {
        auto const k = run.dims("top_logits")[1];
        auto* top_logits = run.data<float>("top_logits");
        auto* top_ids = run.data<std::int32_t>("top_ids");
        auto* sums = run.data<float>("logit_sums");
        for (std::int64_t r = 0; r < rows; ++r) {
            auto const parts = run.dims("logit_sums")[1];
            auto* const sum = sums + (has("sum_of_another_row") ? (r + 1) % rows : r) * parts;
            std::fill_n(sum, parts, 0.0F);
            for (std::int64_t v = 0; v < V; ++v) {
                auto const value = logits[r * V + v];
                sum[v / (V / parts)] += has("sum_skips_nan") && std::isnan(value) ? 0 : value;
            }
            auto const key = [&](std::int32_t v) {
                auto const value = logits[r * V + v];
                auto const nan = std::numeric_limits<float>::infinity() * (has("nan_is_hidden") ? -1.0F : 1.0F);
                return std::isnan(value) ? nan : value;
            };
            std::vector<std::int32_t> order(static_cast<std::size_t>(V));
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return key(a) > key(b); });
            auto const value_row = has("top_values_of_another_row") ? (r + 1) % rows : r;
            for (std::int64_t i = 0; i < k; ++i) {
                auto const id = order[static_cast<std::size_t>(i)];
                top_ids[r * k + i] = has("top_ids_off_by_one") ? (id + 1) % static_cast<std::int32_t>(V) : id;
                top_logits[value_row * k + i] = logits[r * V + id];
            }
            if (has("top_misses_one")) {
                for (std::int64_t i = 1; i + 1 < k; ++i) {
                    top_ids[r * k + i] = order[static_cast<std::size_t>(i + 1)];
                    top_logits[r * k + i] = logits[r * V + order[static_cast<std::size_t>(i + 1)]];
                }
            }
        }
    }
};

} // namespace model
