// A line -> text, and equal lines of many ranks -> one. See strop/obs/log_text.py, which says the same.
#include "merge.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr string_view PREFIX = "{\"time\":\"";
constexpr size_t TIME_SIZE = 27;

bool digit(char c) { return c >= '0' && c <= '9'; }

int64_t days_from_civil(int64_t y, int64_t m, int64_t d) {  // since 1970; after Howard Hinnant's formulas
    y -= m <= 2;
    int64_t era = y / 400, yoe = y - era * 400;
    int64_t doy = (153 * (m + (m > 2 ? -3 : 9)) + 2) / 5 + d - 1;
    return era * 146097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719468;
}

// "2026-11-22T00:11:49.123456Z" in microseconds; false if it is no time.
bool parse_time(const char* t, int64_t* out) {
    static const char shape[] = "dddd-dd-ddTdd:dd:dd.ddddddZ";
    for (size_t i = 0; i < TIME_SIZE; i++)
        if (shape[i] == 'd' ? !digit(t[i]) : t[i] != shape[i]) return false;
    auto number = [t](int from, int size) {
        int64_t value = 0;
        for (int i = from; i < from + size; i++) value = value * 10 + (t[i] - '0');
        return value;
    };
    static char second[19];
    static int64_t second_us = -1;  // most lines are of the same second as the one before
    if (second_us < 0 || memcmp(second, t, 19)) {
        int64_t y = number(0, 4), m = number(5, 2), d = number(8, 2), h = number(11, 2);
        static const int64_t days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
        bool leap = (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
        if (y < 1970 || m < 1 || m > 12 || d < 1 || d > days[m - 1] + (m == 2 && leap)) return false;
        if (h > 23 || number(14, 2) > 59 || number(17, 2) > 59) return false;
        memcpy(second, t, 19);
        second_us = 1000000 * (86400 * days_from_civil(y, m, d) + 3600 * h + 60 * number(14, 2) + number(17, 2));
    }
    *out = second_us + number(20, 6);
    return true;
}

// A JSON string from its opening quote; returns the byte behind it, or NULL.
const char* skip_string(const char* p, const char* end) {
    for (++p; p < end; ++p) {
        if (*p == '"') return p + 1;
        if ((unsigned char)*p < 0x20) return nullptr;
        if (*p != '\\') continue;
        if (++p == end) return nullptr;
        if (*p == 'u') {
            for (int i = 0; i < 4; i++)
                if (++p >= end || !isxdigit((unsigned char)*p)) return nullptr;
        } else if (!memchr("\"\\/bfnrt", *p, 8)) {
            return nullptr;
        }
    }
    return nullptr;
}

const char* skip_digits(const char* p, const char* end) {
    while (p < end && digit(*p)) ++p;
    return p;
}

const char* skip_number(const char* p, const char* end) {
    if (p < end && *p == '-') ++p;
    const char* start = p;
    if ((p = skip_digits(p, end)) == start) return nullptr;
    if (p < end && *p == '.') {
        start = ++p;
        if ((p = skip_digits(p, end)) == start) return nullptr;
    }
    if (p < end && (*p == 'e' || *p == 'E')) {
        if (++p < end && (*p == '+' || *p == '-')) ++p;
        start = p;
        if ((p = skip_digits(p, end)) == start) return nullptr;
    }
    return p;
}

const char* skip_value(const char* p, const char* end) {
    if (p == end) return nullptr;
    if (*p == '"') return skip_string(p, end);
    for (string_view word : {"null", "true", "false"})
        if (string_view(p, end - p).substr(0, word.size()) == word) return p + word.size();
    if (*p != '[') return skip_number(p, end);
    if (++p < end && *p == ']') return p + 1;
    while ((p = skip_number(p, end)) && p < end) {
        if (*p == ']') return p + 1;
        if (*p++ != ',') return nullptr;
    }
    return nullptr;
}

// A whole number of at most 18 digits, else -1.
int64_t whole_number(string_view text) {
    int64_t value = 0;
    if (text.empty() || text.size() > 18 || !std::all_of(text.begin(), text.end(), digit)) return -1;
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;
}

string_view inside(string_view value) {
    return value[0] == '"' ? value.substr(1, value.size() - 2) : string_view();
}

void take(Line* line, string_view key, string_view value) {
    if (key == "step") line->step = whole_number(value);
    else if (key == "message") line->message = inside(value);
    else if (key == "level") line->level = inside(value);
    else if (key == "logger") line->logger = inside(value);
    else if (key == "phase") line->phase = inside(value);
    else if (key == "node") line->node = inside(value);
    else if (key == "traceback") line->traceback = inside(value);
    else if (key == "dropped") line->dropped = std::max<int64_t>(0, whole_number(value));
    else if (key == "raw" && value[0] == '[') {
        string_view pair = value.substr(1, value.size() - 2);
        size_t comma = pair.find(',');
        if (comma == string_view::npos) return;
        int64_t at = whole_number(pair.substr(0, comma)), offset = whole_number(pair.substr(comma + 1));
        if (at >= 0 && offset >= 0) line->mark_segment = at, line->mark_offset = offset;
    }
}

struct Lower {
    constexpr Lower() : of() {
        for (int c = 0; c < 256; c++) of[c] = c >= 'A' && c <= 'Z' ? c + 32 : c;
    }
    constexpr unsigned char operator[](unsigned char c) const { return of[c]; }
    unsigned char of[256];
};
constexpr Lower LOWER;

// Whether a = or : follows, behind quotes, blanks and what JSON makes of them.
bool assigned(string_view text, size_t at) {
    for (; at < text.size(); at++) {
        char c = text[at];
        if (c == '=' || c == ':') return true;
        if (c == '\\') at++;
        else if (c != '"' && c != '\'' && c != ' ' && LOWER[(unsigned char)c] != 's') return false;
    }
    return false;
}

// Bytes of the valid UTF-8 sequence at p, 0 if there is none.
int sequence(const unsigned char* p, const unsigned char* end) {
    auto more = [p, end](int n) {
        for (int i = 1; i <= n; i++)
            if (p + i >= end || (p[i] & 0xC0) != 0x80) return 0;
        return n + 1;
    };
    if (p[0] < 0x80) return 1;
    if (p[0] >= 0xC2 && p[0] <= 0xDF) return more(1);
    if (p[0] >= 0xE0 && p[0] <= 0xEF) {
        if (!more(2) || (p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
        return 3;
    }
    if (p[0] >= 0xF0 && p[0] <= 0xF4) {
        if (!more(3) || (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
        return 4;
    }
    return 0;
}

void append_code(string* out, uint32_t c) {
    auto byte = [out](uint32_t value) { out->push_back((char)value); };
    if (c < 0x80) byte(c);
    else if (c < 0x800) byte(0xC0 | c >> 6), byte(0x80 | (c & 63));
    else if (c < 0x10000) byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63));
    else byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 63)), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63));
}

void append_hex(string* out, const char* before, unsigned char c) {
    static const char hex[] = "0123456789abcdef";
    *out += before;
    out->push_back(hex[c >> 4]);
    out->push_back(hex[c & 15]);
}

// For people: no control characters but tabs, further lines indented.
void append_clean(string* out, string_view text) {
    while (!text.empty() && text.back() == '\n') text.remove_suffix(1);
    auto* p = (const unsigned char*)text.data();
    auto* end = p + text.size();
    while (p < end) {
        auto* start = p;
        while (p < end && *p >= 0x20 && *p < 0x7F) ++p;
        out->append((const char*)start, p - start);
        if (p == end) return;
        int size = sequence(p, end);
        if (*p == '\n') *out += "\n    ";
        else if (*p == '\t') out->push_back('\t');
        else if (*p < 0x80 || !size) append_hex(out, "\\x", *p), size = 1;
        else if (*p == 0xC2 && p[1] < 0xA0) append_hex(out, "\\x", p[1]);
        else out->append((const char*)p, size);
        p += size;
    }
}

string rank_list(std::vector<int64_t> ranks) {
    std::sort(ranks.begin(), ranks.end());
    string out;
    for (size_t i = 0, j; i < ranks.size(); i = j) {
        for (j = i + 1; j < ranks.size() && ranks[j] == ranks[j - 1] + 1; j++) {}
        out += (i ? "," : "") + std::to_string(ranks[i]);
        if (j > i + 1) out += "-" + std::to_string(ranks[j - 1]);
    }
    return out;
}

const char* colour_of(string_view level) {
    if (level == "DEBUG") return "\x1b[2m";
    if (level == "WARNING") return "\x1b[33m";
    if (level == "ERROR") return "\x1b[31m";
    if (level == "CRITICAL") return "\x1b[1;31m";
    return level == "RAW" ? "\x1b[35m" : "";
}

}  // namespace

Hints::Hints(const char* lines) : groups_(1 << 16), words_(1) {
    for (const char* end; (end = strchr(lines, '\n')); lines = end + 1) {
        uint16_t& group = groups_[(unsigned char)lines[1] << 8 | (unsigned char)lines[2]];
        if (!group) group = words_.size(), words_.emplace_back();
        words_[group].emplace_back(lines, end);
    }
}

bool Hints::in(string_view text) const {
    unsigned before = 0;
    for (size_t i = 0; i < text.size(); i++) {
        unsigned c = LOWER[(unsigned char)text[i]];
        uint16_t group = groups_[before << 8 | c];
        before = c;
        if (!group) continue;
        for (const string& word : words_[group]) {
            size_t size = word.size() - 1;
            if (size > text.size() - (i - 1)) continue;
            size_t n = 2;
            while (n < size && LOWER[(unsigned char)text[i - 1 + n]] == (unsigned char)word[n + 1]) ++n;
            if (n == size && (word[0] != '=' || assigned(text, i - 1 + n))) return true;
        }
    }
    return false;
}

int level_number(string_view level) {
    if (level == "DEBUG") return 10;
    if (level == "WARNING" || level == "RAW") return 30;
    if (level == "ERROR") return 40;
    return level == "CRITICAL" ? 50 : 20;
}

bool valid_utf8(string_view text) {
    auto* p = (const unsigned char*)text.data();
    auto* end = p + text.size();
    while (p < end) {
        uint64_t word;
        if (end - p >= 8 && (memcpy(&word, p, 8), (word & 0x8080808080808080) == 0)) {
            p += 8;
            continue;
        }
        int size = sequence(p, end);
        if (!size) return false;
        p += size;
    }
    return true;
}

// Flat JSON as log_line.encode writes it, the time first. False: show it as it is.
bool parse_line(string_view text, Line* line) {
    const char *p = text.data() + PREFIX.size(), *end = text.data() + text.size();
    if (text.size() < PREFIX.size() + TIME_SIZE + 2 || text.substr(0, PREFIX.size()) != PREFIX) return false;
    if (!parse_time(p, &line->time)) return false;
    p += TIME_SIZE;
    if (*p++ != '"') return false;
    line->whole = text;
    while (p < end && *p == ',') {
        if (++p == end || *p != '"') return false;
        const char* colon = (const char*)memchr(p + 1, '"', end - p - 1);
        if (!colon) return false;
        string_view key(p + 1, colon - p - 1);
        for (char c : key)
            if (!((c >= 'a' && c <= 'z') || c == '_')) return false;
        p = colon + 1;
        if (key.empty() || p == end || *p++ != ':') return false;
        const char* value = p;
        if (!(p = skip_value(p, end))) return false;
        take(line, key, string_view(value, p - value));
    }
    if (p + 1 != end || *p != '}') return false;
    line->bad_utf8 = !valid_utf8(text);
    return true;
}

// The text of a JSON string; half a surrogate pair stays as it is written.
string unescape(string_view text) {
    size_t slash = text.find('\\');
    if (slash == string_view::npos) return string(text);
    string out(text.substr(0, slash));
    auto code = [text](size_t i) {
        uint32_t value = 0;
        std::from_chars(text.data() + i + 2, text.data() + i + 6, value, 16);
        return value;
    };
    for (size_t i = slash; i < text.size();) {
        if (text[i] != '\\') {
            out.push_back(text[i++]);
        } else if (text[i + 1] != 'u') {
            static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
            auto* at = (const char*)memchr(from, text[i + 1], 5);
            out.push_back(at ? to[at - from] : text[i + 1]);
            i += 2;
        } else {
            uint32_t c = code(i), low = 0;
            if (c >= 0xD800 && c < 0xDC00 && text.substr(i + 6, 2) == "\\u") low = code(i + 6);
            if (low >= 0xDC00 && low < 0xE000) {
                append_code(&out, 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00));
                i += 12;
            } else {
                if (c >= 0xD800 && c < 0xE000) out.append(text.substr(i, 6));
                else append_code(&out, c);
                i += 6;
            }
        }
    }
    return out;
}

void append_valid(string* out, string_view text, const char* backslash) {
    auto* p = (const unsigned char*)text.data();
    auto* end = p + text.size();
    while (p < end) {
        int size = sequence(p, end);
        if (size) out->append((const char*)p, size);
        else append_hex(out, backslash, *p), size = 1;
        p += size;
    }
}

// JSON without the control characters that JSON allows: DEL, and 80 to 9F.
void append_printable(string* out, string_view json) {
    for (size_t i = 0, next; i < json.size(); i = next) {
        for (next = i; next < json.size(); next++) {
            unsigned char c = json[next];
            if (c == 0x7F || (c == 0xC2 && (unsigned char)json[next + 1] < 0xA0)) break;
        }
        out->append(json.substr(i, next - i));
        if (next == json.size()) return;
        next += (unsigned char)json[next] == 0xC2;
        append_hex(out, "\\u00", json[next++]);
    }
}

// A JSON string with its quotes.
void append_json(string* out, string_view text) {
    string quoted = "\"";
    for (char c : text) {
        static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
        auto* at = (const char*)memchr(from, c, 7);
        if (at) quoted.push_back('\\'), quoted.push_back(to[at - from]);
        else if ((unsigned char)c < 0x20) append_hex(&quoted, "\\u00", c);
        else quoted.push_back(c);
    }
    append_printable(out, quoted += '"');
}

void append_time(string* out, int64_t time_us, bool iso) {
    static int64_t second = -1;
    static char text[64];
    if (time_us / 1000000 != second) {
        second = time_us / 1000000;
        int64_t z = second / 86400 + 719468, era = z / 146097, doe = z - era * 146097;
        int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
        int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
        int64_t d = doy - (153 * mp + 2) / 5 + 1, m = mp < 10 ? mp + 3 : mp - 9, s = second % 86400;
        snprintf(text, sizeof text, "%04d-%02d-%02dT%02d:%02d:%02d", (int)(yoe + era * 400 + (m <= 2)),
                 (int)m, (int)d, (int)(s / 3600), (int)(s / 60 % 60), (int)(s % 60));
    }
    char rest[8];
    int64_t us = time_us % 1000000;
    for (int i = 6; i >= 1; i--, us /= 10) rest[i] = (char)('0' + us % 10);
    rest[0] = '.', rest[7] = 'Z';
    size_t at = out->size();
    out->append(text, 19);
    if (!iso) (*out)[at + 10] = ' ';
    iso ? out->append(rest, 8) : out->append(rest, 4);
}

// ------------------------------------------------------------------------------------------- Printer

void Printer::add(const Line& line, const strop_log_stream& stream) {
    if (options_.json) json(line, stream);
    else if (options_.collapse) collapse(line, stream);
    else one(line, stream);
}

void Printer::json(const Line& line, const strop_log_stream& stream) {
    if (!line.plain) {
        out += PREFIX;
        append_time(&out, line.time, true);
        string_view rest = line.whole.substr(PREFIX.size() + TIME_SIZE);
        string valid;
        if (line.bad_utf8) append_valid(&valid, rest, "\\\\x"), rest = valid;
        append_printable(&out, rest);
        out += '\n';
        return;
    }
    string message, node, phase;
    append_valid(&message, line.message, "\\x");
    append_valid(&node, unescape(line.node), "\\x");
    append_valid(&phase, unescape(line.phase), "\\x");
    out += PREFIX;
    append_time(&out, line.time, true);
    out += "\",\"rank\":" + std::to_string(stream.rank) + ",\"node\":";
    node.empty() ? (void)(out += "null") : append_json(&out, node);
    out += ",\"attempt\":" + std::to_string(stream.attempt) + ",\"step\":";
    out += (line.step < 0 ? "null" : std::to_string(line.step)) + ",\"phase\":";
    phase.empty() ? (void)(out += "null") : append_json(&out, phase);
    out += ",\"level\":\"RAW\",\"logger\":\"\",\"message\":";
    append_json(&out, message);
    out += "}\n";
}

static void fill(Group* group, const Line& line, const strop_log_stream& stream) {
    group->key_us = line.key, group->time = line.time, group->attempt = stream.attempt, group->step = line.step;
    group->level = line.level, group->phase = line.phase, group->logger = line.logger;
    group->traceback = line.traceback;
    group->ranks.push_back(stream.rank);
}

void Printer::one(const Line& line, const strop_log_stream& stream) {
    Group group;
    fill(&group, line, stream);
    group.message = line.plain ? string(line.message) : unescape(line.message);
    print(group);
}

void Printer::collapse(const Line& line, const strop_log_stream& stream) {
    expire(line.key);
    string decoded;
    if (options_.ranges) split(decoded = line.plain ? string(line.message) : unescape(line.message));
    key_.clear();
    key_ += line.plain ? '1' : '0';
    key_ += std::to_string(stream.attempt) + ',' + std::to_string(options_.ranges ? 0 : line.step) + ',';
    (key_ += line.level) += '\0';
    (key_ += line.logger) += '\0';
    (key_ += line.phase) += '\0';
    (key_ += line.traceback) += '\0';
    if (options_.ranges) for (const string& piece : text_) (key_ += piece) += '\0';
    else key_ += line.message;
    auto found = open_.find(key_);
    uint64_t bit = 1ULL << (stream.rank % 64);
    size_t word = stream.rank / 64;
    if (found != open_.end()) {
        Group& group = *found->second;
        if (group.seen.size() <= word) group.seen.resize(word + 1);
        if (!(group.seen[word] & bit)) {
            group.seen[word] |= bit;
            group.ranks.push_back(stream.rank);
            widen(&group);
            return;
        }
        open_.erase(found);  // the rank says it once more: another line
    }
    if ((int64_t)groups_.size() >= options_.max_groups) pop();
    groups_.emplace_back();
    Group& group = groups_.back();
    fill(&group, line, stream);
    group.key = key_;
    if (options_.ranges) group.text = text_, group.numbers = numbers_;
    else group.message = line.plain ? string(line.message) : unescape(line.message);
    group.seen.resize(word + 1);
    group.seen[word] |= bit;
    open_[group.key] = &group;
}

// The text around its numbers, and the numbers: digits, with a fraction and an exponent where they are.
void Printer::split(const string& message) {
    text_.assign(1, "");
    numbers_.clear();
    const char *p = message.data(), *end = p + message.size();
    while (p < end) {
        const char* number = p;
        if (*p == '-' && (p == message.data() || memchr(" =([,:", p[-1], 6)) && p + 1 < end && digit(p[1])) ++p;
        if (!digit(*p)) {
            text_.back().push_back(*p++);
            continue;
        }
        p = skip_digits(p, end);
        if (p + 1 < end && *p == '.' && digit(p[1])) p = skip_digits(p + 1, end);
        const char* exponent = p;
        if (exponent < end && (*exponent == 'e' || *exponent == 'E')) {
            if (++exponent < end && (*exponent == '+' || *exponent == '-')) ++exponent;
            if (exponent < end && digit(*exponent)) p = skip_digits(exponent, end);
        }
        double value = strtod(string(number, p).c_str(), nullptr);
        numbers_.push_back({value, value, string(number, p), string(number, p)});
        text_.emplace_back();
    }
}

void Printer::widen(Group* group) {
    for (size_t i = 0; i < group->numbers.size(); i++) {
        Number& number = group->numbers[i];
        if (numbers_[i].low < number.low) number.low = numbers_[i].low, number.low_text = numbers_[i].low_text;
        if (numbers_[i].high > number.high) number.high = numbers_[i].high, number.high_text = numbers_[i].high_text;
    }
}

void Printer::expire(int64_t key_us) {
    while (!groups_.empty() && key_us - groups_.front().key_us > options_.window_us) pop();
}

void Printer::flush() {
    while (!groups_.empty()) pop();
}

void Printer::pop() {
    Group& group = groups_.front();
    auto found = open_.find(group.key);
    if (found != open_.end() && found->second == &group) open_.erase(found);
    if (!group.text.empty()) {
        for (size_t i = 0; i < group.text.size(); i++) {
            group.message += group.text[i];
            if (i >= group.numbers.size()) break;
            const Number& number = group.numbers[i];
            if (number.low == number.high) group.message += number.low_text;
            else group.message += "[" + number.low_text + ".." + number.high_text + "]";
        }
    }
    print(group);
    groups_.pop_front();
}

void Printer::print(const Group& group) {
    const char* off = options_.colour ? "\x1b[0m" : "";
    if (options_.colour) out += "\x1b[2m";
    append_time(&out, group.time, false);
    (out += off) += ' ';
    if (options_.show_attempt) out += "#" + std::to_string(group.attempt) + " ";
    if (options_.colour) out += "\x1b[36m";
    ((out += '[') += rank_list(group.ranks)) += ']';
    (out += off) += ' ';
    if (options_.colour) out += colour_of(group.level);
    size_t start = out.size();
    append_clean(&out, unescape(group.level));
    if (out.size() < start + 8) out.append(start + 8 - out.size(), ' ');
    (out += off) += ' ';
    if (!group.phase.empty()) append_clean(&out, unescape(group.phase));
    if (group.step >= 0) out += (group.phase.empty() ? "step " : " ") + std::to_string(group.step);
    if (!group.phase.empty() || group.step >= 0) out += ": ";
    if (!group.logger.empty() && group.logger != "strop") append_clean(&out, unescape(group.logger)), out += ": ";
    append_clean(&out, group.message);
    if (!group.traceback.empty()) out += "\n    ", append_clean(&out, unescape(group.traceback));
    out += '\n';
}
