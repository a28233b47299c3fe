//! Reads PromQL as far as a dashboard and alerts need it, and refuses what Prometheus would refuse: by grammar, by the types of operands and
//! arguments, by the names of functions. promtool says the same and more, but is not everywhere.

use std::collections::BTreeSet;

/// What an expression evaluates to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Scalar,
    Text,
    Instant,
    Range,
}

use Type::{Instant, Range, Scalar, Text};

/// The functions that are known here, the types of their arguments and their result.
const FUNCTIONS: &[(&str, &[Type], Type)] = &[
    ("abs", &[Instant], Instant),
    ("absent", &[Instant], Instant),
    ("avg_over_time", &[Range], Instant),
    ("changes", &[Range], Instant),
    ("clamp_max", &[Instant, Scalar], Instant),
    ("clamp_min", &[Instant, Scalar], Instant),
    ("delta", &[Range], Instant),
    ("histogram_quantile", &[Scalar, Instant], Instant),
    ("increase", &[Range], Instant),
    ("irate", &[Range], Instant),
    ("label_replace", &[Instant, Text, Text, Text, Text], Instant),
    ("max_over_time", &[Range], Instant),
    ("min_over_time", &[Range], Instant),
    ("predict_linear", &[Range, Scalar], Instant),
    ("rate", &[Range], Instant),
    ("scalar", &[Instant], Scalar),
    ("time", &[], Scalar),
    ("vector", &[Scalar], Instant),
];

/// Aggregations, and whether they take a number before the vector.
const AGGREGATIONS: &[(&str, bool)] = &[
    ("avg", false),
    ("bottomk", true),
    ("count", false),
    ("max", false),
    ("min", false),
    ("quantile", true),
    ("sum", false),
    ("topk", true),
];

/// Operators of two operands, from the weakest binding to the strongest. `^` binds to the right.
const OPERATORS: &[&[&str]] = &[
    &["or"],
    &["and", "unless"],
    &["==", "!=", "<=", "<", ">=", ">"],
    &["+", "-"],
    &["*", "/", "%", "atan2"],
    &["^"],
];

/// The metrics that an expression asks for, or why it is none.
pub fn metrics_of(text: &str) -> Result<BTreeSet<String>, String> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        metrics: BTreeSet::new(),
    };
    let kind = parser.binary(0)?;
    if parser.at < parser.tokens.len() {
        return Err(format!("{:?} is left over", &parser.tokens[parser.at..]));
    }
    match kind {
        Scalar | Instant => Ok(parser.metrics),
        Text | Range => Err(format!("{kind:?} cannot be drawn")),
    }
}

/// A duration as Prometheus writes it: `5m`, `1h30m`.
pub fn is_duration(text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let after = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let unit = ["ms", "s", "m", "h", "d", "w", "y"]
            .into_iter()
            .find_map(|unit| after.strip_prefix(unit));
        match unit {
            Some(more) if after.len() < rest.len() => rest = more,
            _ => return false,
        }
    }
    !text.is_empty()
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Number,
    Duration,
    Text,
    Sign(&'static str),
}

const SIGNS: &[&str] = &[
    "=~", "!~", "!=", "==", ">=", "<=", "=", "<", ">", "+", "-", "*", "/", "%", "^", "(", ")", "{", "}", "[", "]", ",",
];

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, length) = if first.is_ascii_digit() {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '.';
            let length = rest.find(|c| !word(c)).unwrap_or(rest.len());
            match &rest[..length] {
                number if number.parse::<f64>().is_ok() => (Token::Number, length),
                duration if is_duration(duration) => (Token::Duration, length),
                other => return Err(format!("{other} is no number and no duration")),
            }
        } else if first.is_ascii_alphabetic() || first == '_' {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
            let length = rest.find(|c| !word(c)).unwrap_or(rest.len());
            (Token::Word(rest[..length].to_owned()), length)
        } else if first == '"' {
            let mut escaped = false;
            let end = rest[1..].find(|c| {
                let is_end = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                is_end
            });
            (Token::Text, end.ok_or_else(|| format!("no end: {rest}"))? + 2)
        } else {
            let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign));
            let sign = sign.ok_or_else(|| format!("{first:?} in {rest}"))?;
            (Token::Sign(sign), sign.len())
        };
        found.push(token);
        rest = rest[length..].trim_start();
    }
    Ok(found)
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    metrics: BTreeSet<String>,
}

impl Parser {
    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn word(&mut self) -> Result<String, String> {
        match self.next() {
            Some(Token::Word(word)) => Ok(word),
            other => Err(format!("{other:?} where a name belongs")),
        }
    }

    /// Takes a sign or a word that reads like this, if it is the next.
    fn takes(&mut self, wanted: &str) -> bool {
        let is_it = match self.tokens.get(self.at) {
            Some(Token::Sign(sign)) => *sign == wanted,
            Some(Token::Word(word)) => word == wanted,
            _ => false,
        };
        self.at += usize::from(is_it);
        is_it
    }

    fn needs(&mut self, wanted: &str) -> Result<(), String> {
        match self.takes(wanted) {
            true => Ok(()),
            false => Err(format!("{:?} where {wanted} belongs", self.tokens.get(self.at))),
        }
    }

    fn binary(&mut self, level: usize) -> Result<Type, String> {
        let Some(operators) = OPERATORS.get(level) else {
            return self.unary();
        };
        let mut left = self.binary(level + 1)?;
        while let Some(operator) = operators.iter().find(|operator| self.takes(operator)) {
            let is_bool = self.takes("bool");
            if self.takes("on") || self.takes("ignoring") {
                self.labels()?;
                if self.takes("group_left") || self.takes("group_right") {
                    self.labels()?;
                }
            }
            let right = self.binary(if *operator == "^" { level } else { level + 1 })?;
            let are_scalars = (left, right) == (Scalar, Scalar);
            let is_comparison = level == 2;
            if [left, right].iter().any(|side| !matches!(side, Scalar | Instant)) {
                return Err(format!("{left:?} {operator} {right:?}"));
            }
            if level < 2 && (left, right) != (Instant, Instant) {
                return Err(format!("{operator} is for vectors"));
            }
            if is_bool && !is_comparison || is_comparison && are_scalars && !is_bool {
                return Err(format!("bool beside {operator}"));
            }
            left = if are_scalars { Scalar } else { Instant };
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Type, String> {
        if self.takes("-") || self.takes("+") {
            return match self.unary()? {
                kind @ (Scalar | Instant) => Ok(kind),
                kind @ (Text | Range) => Err(format!("a sign before {kind:?}")),
            };
        }
        if self.takes("(") {
            let kind = self.binary(0)?;
            self.needs(")")?;
            return Ok(kind);
        }
        match self.next() {
            Some(Token::Number) => Ok(Scalar),
            Some(Token::Text) => Ok(Text),
            Some(Token::Word(word)) => self.named(word),
            other => Err(format!("{other:?} where an expression begins")),
        }
    }

    /// What begins with a name: an aggregation, a function or a selector.
    fn named(&mut self, name: String) -> Result<Type, String> {
        if let Some((_, takes_number)) = AGGREGATIONS.iter().find(|(known, _)| *known == name) {
            let labels_first = self.takes("by") || self.takes("without");
            if labels_first {
                self.labels()?;
            }
            let wanted: &[Type] = if *takes_number { &[Scalar, Instant] } else { &[Instant] };
            self.arguments(&name, wanted)?;
            if !labels_first && (self.takes("by") || self.takes("without")) {
                self.labels()?;
            }
            return Ok(Instant);
        }
        if self.tokens.get(self.at) == Some(&Token::Sign("(")) {
            let known = FUNCTIONS.iter().find(|(known, ..)| *known == name);
            let (_, wanted, result) = known.ok_or_else(|| format!("no function {name} is known"))?;
            self.arguments(&name, wanted)?;
            return Ok(*result);
        }
        self.metrics.insert(name);
        if self.takes("{") {
            while !self.takes("}") {
                self.word()?;
                if !["=", "!=", "=~", "!~"].iter().any(|matcher| self.takes(matcher)) || self.next() != Some(Token::Text) {
                    return Err("a label needs = != =~ or !~ and a text".to_owned());
                }
                if !self.takes(",") {
                    self.needs("}")?;
                    break;
                }
            }
        }
        let is_range = self.takes("[");
        if is_range {
            self.duration()?;
            self.needs("]")?;
        }
        if self.takes("offset") {
            self.duration()?;
        }
        Ok(if is_range { Range } else { Instant })
    }

    fn duration(&mut self) -> Result<(), String> {
        match self.next() {
            Some(Token::Duration) => Ok(()),
            other => Err(format!("{other:?} where a duration belongs")),
        }
    }

    fn arguments(&mut self, name: &str, wanted: &[Type]) -> Result<(), String> {
        self.needs("(")?;
        let mut given = Vec::new();
        while !self.takes(")") {
            if !given.is_empty() {
                self.needs(",")?;
            }
            given.push(self.binary(0)?);
        }
        match given == wanted {
            true => Ok(()),
            false => Err(format!("{name} takes {wanted:?}, not {given:?}")),
        }
    }

    fn labels(&mut self) -> Result<(), String> {
        self.needs("(")?;
        while !self.takes(")") {
            self.word()?;
            if !self.takes(",") {
                return self.needs(")");
            }
        }
        Ok(())
    }
}

#[test]
fn what_prometheus_refuses_is_refused_here() {
    for good in [
        "up{job=\"a\\\"b\"} == 0",
        "max by (job) (a) == 0 or absent(a)",
        "sum(rate(a{b=~\"5..\",}[1h30m])) by (c) / on (c) group_left (d) b",
        "a > bool 1",
        "-2 ^ 2 * a",
        "topk(3, a offset 5m)",
    ] {
        metrics_of(good).unwrap_or_else(|why| panic!("{good}: {why}"));
    }
    for bad in [
        "",
        "sum(a",
        "sum(a) by",
        "sum(rate(a))",
        "rate(a[5x])",
        "rate(a[])",
        "a[5m]",
        "a b",
        "a{b}",
        "a{b=c}",
        "a{b=\"c}",
        "a +",
        "1 > 2",
        "a and 1",
        "a + bool b",
        "raet(a[5m])",
        "histogram_quantile(a)",
        "a{job=\"$job\"} $",
    ] {
        assert!(metrics_of(bad).is_err(), "{bad}");
    }
    assert_eq!(Vec::from_iter(metrics_of("sum(x) / (y > 0)").unwrap()), ["x", "y"]);
}
