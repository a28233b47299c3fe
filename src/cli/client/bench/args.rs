//! Flags of `bench`.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::super::args::{duration, duration_or_none};

/// `metcd bench …`
#[derive(Debug, Subcommand)]
#[command(
    after_help = "Examples:\n  metcd bench put --connections 64 --duration 30s\n  metcd bench get --distribution zipf --serializable\n  \
                        metcd bench mixed --reads 90 --rate 5000\n  metcd bench watch --watchers 100 --rate 200\n  \
                        metcd bench put --endpoints http://127.0.0.1:8080/kv    # any server with PUT and GET of a path"
)]
pub enum BenchCommand {
    /// Writes.
    #[command(after_help = "Example:\n  metcd bench put --connections 64 --value-size 512 --duration 30s")]
    Put(LoadArgs),
    /// Reads; the keys are written first.
    #[command(after_help = "Example:\n  metcd bench get --connections 64 --distribution zipf")]
    Get(LoadArgs),
    /// Reads and writes.
    #[command(after_help = "Example:\n  metcd bench mixed --reads 90 --rate 5000")]
    Mixed {
        #[command(flatten)]
        load: LoadArgs,
        /// How many of a hundred requests read.
        #[arg(long, default_value_t = 90, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
        reads: u8,
    },
    /// How long a change takes to reach watchers.
    #[command(after_help = "Example:\n  metcd bench watch --watchers 100 --rate 200")]
    Watch(WatchArgs),
}

/// What all loads have.
#[derive(Debug, Clone, Args)]
pub struct LoadArgs {
    /// Connections, each with one request at a time; spread over the endpoints.
    #[arg(short, long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) connections: u32,
    /// How long to measure.
    #[arg(short, long, default_value = "10s", value_parser = duration, value_name = "TIME")]
    pub(super) duration: Duration,
    /// Stop after so many requests, if that comes first.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) requests: Option<u64>,
    /// Requests a second in all, sent on time however slow the answers are: latency then includes the wait for a free connection.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(super) rate: Option<f64>,
    /// Load before measuring begins.
    #[arg(long, default_value = "1s", value_parser = duration_or_none, value_name = "TIME")]
    pub(super) warm_up: Duration,
    /// How many different keys.
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(super) keys: u64,
    /// Bytes of a key.
    #[arg(long, default_value_t = 16, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(super) key_size: u16,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_name = "BYTES")]
    pub(super) value_size: u32,
    /// How keys are chosen.
    #[arg(long, value_enum, default_value_t = Choice::Uniform)]
    pub(super) distribution: Choice,
    /// How unequal zipf is: 0 is uniform, nearly 1 is very.
    #[arg(long, default_value_t = 0.99, value_parser = theta, value_name = "THETA")]
    pub(super) theta: f64,
    /// How the keys begin.
    #[arg(long, default_value = "bench-", value_name = "PREFIX", value_parser = prefix)]
    pub(super) prefix: String,
    /// Threads of the load generator.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(super) threads: u32,
    /// Do not write the keys before reading them; a key that is not there (404) counts as an answer.
    #[arg(long)]
    pub(super) no_fill: bool,
    /// The same keys in the same order each time.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) seed: u64,
}

/// `--distribution`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Choice {
    /// All keys alike.
    Uniform,
    /// Few keys often.
    Zipf,
}

/// `metcd bench watch`
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Watches of the same keys, each with a connection of its own.
    #[arg(short, long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) watchers: u32,
    /// Changes a second, put on time however slow the answers are, as long as no more than 256 are under way.
    #[arg(long, default_value_t = 100.0, value_name = "N", value_parser = positive)]
    pub(super) rate: f64,
    /// How long to measure.
    #[arg(short, long, default_value = "10s", value_parser = duration, value_name = "TIME")]
    pub(super) duration: Duration,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_name = "BYTES")]
    pub(super) value_size: u32,
    /// The key that changes.
    #[arg(long, default_value = "bench-watch", value_parser = prefix)]
    pub(super) key: String,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("it must be a number above 0".to_owned()),
    }
}

fn theta(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("it must be at least 0 and below 1".to_owned()),
    }
}

/// These go into a URL as they are.
fn prefix(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    match text.bytes().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("only letters, digits and -._~/ here".to_owned()),
    }
}
