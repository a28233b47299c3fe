//! `member …` and `leader …`.

use clap::{Args, Subcommand};
use serde_json::{Map, Value};

use super::output::{self, Format, Table};
use super::{Session, print};
use crate::cli::CliError;
use crate::client::{Leader, Member, Members, NewMember};

/// `metcd member …`
#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// List the members.
    #[command(after_help = "Example:\n  metcd member list --output table")]
    List,
    /// Add a member; it joins as a learner and becomes a voter by itself.
    Add(AddArgs),
    /// Remove a member for ever; its id is not used again.
    Remove(RemoveArgs),
    /// Make a learner a voter.
    #[command(after_help = "Example:\n  metcd member promote 4")]
    Promote {
        /// The member.
        id: u64,
    },
    /// Change a member's address or name.
    Update(UpdateArgs),
    /// Replace a member by another one, which is caught up first.
    Replace(ReplaceArgs),
}

/// `metcd leader …`
#[derive(Debug, Subcommand)]
pub enum LeaderCommand {
    /// Print the leader.
    #[command(after_help = "Example:\n  metcd leader show")]
    Show,
    /// Hand leadership to a member.
    #[command(after_help = "Example:\n  metcd leader transfer 2")]
    Transfer {
        /// The member that is to lead.
        id: u64,
    },
}

/// `metcd member add`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd member add http://127.0.0.1:6380\n  metcd member add http://127.0.0.1:6380 --id 4 --name node4 --learner"
)]
pub struct AddArgs {
    #[command(flatten)]
    address: Address,
    /// Its id; the cluster assigns one if it is left out.
    #[arg(long)]
    id: Option<u64>,
    #[command(flatten)]
    described: Described,
    /// It stays a learner: it gets everything and does not vote.
    #[arg(long)]
    learner: bool,
}

/// Where the other members will reach the new one: by itself, or as `member update` takes it.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Address {
    /// Where the other members will reach it.
    #[arg(value_name = "PEER_URL")]
    positional: Option<String>,
    /// The same as PEER_URL.
    #[arg(long = "peer-url", value_name = "URL")]
    flag: Option<String>,
}

impl Address {
    fn url(&self) -> &str {
        // One of them is there: the group is required.
        self.positional.as_deref().or(self.flag.as_deref()).unwrap_or_default()
    }
}

#[derive(Debug, Args)]
struct Described {
    /// Where clients reach it.
    #[arg(long, value_name = "URL")]
    client_url: Option<String>,
    /// What people call it.
    #[arg(long)]
    name: Option<String>,
}

/// `metcd member remove`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  metcd member remove 3")]
pub struct RemoveArgs {
    /// The member.
    id: u64,
    /// Although the rest has no healthy quorum.
    #[arg(long)]
    force: bool,
}

/// `metcd member update`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  metcd member update 3 --peer-url http://10.0.0.3:3380\n  metcd member update 3 --name alpha")]
pub struct UpdateArgs {
    /// The member.
    id: u64,
    /// Where the other members reach it.
    #[arg(long, value_name = "URL")]
    peer_url: Option<String>,
    #[command(flatten)]
    described: Described,
}

/// `metcd member replace`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  metcd member replace 2 http://127.0.0.1:6380 --id 4")]
pub struct ReplaceArgs {
    /// The member that goes.
    remove: u64,
    #[command(flatten)]
    address: Address,
    /// Its id; the cluster assigns one if it is left out.
    #[arg(long)]
    id: Option<u64>,
    #[command(flatten)]
    described: Described,
}

fn new_member(id: Option<u64>, peer_url: &str, described: &Described, learner: bool) -> NewMember {
    NewMember {
        id,
        peer_url: peer_url.to_owned(),
        client_url: described.client_url.clone(),
        name: described.name.clone(),
        role: learner.then_some("learner"),
    }
}

pub(super) async fn run(session: &Session, command: &MemberCommand) -> Result<(), CliError> {
    let client = &session.client;
    match command {
        MemberCommand::List => list(session, &client.members().await?),
        MemberCommand::Add(args) => {
            let member = new_member(args.id, args.address.url(), &args.described, args.learner);
            let (member, is_new) = client.add_member(&member).await?;
            let what = if is_new { "added" } else { "was there already, with this address" };
            show(session, what, &member)
        }
        MemberCommand::Remove(args) => {
            client.remove_member(args.id, args.force).await?;
            match session.format {
                Format::Json => output::json(&serde_json::json!({"id": args.id, "removed": true})),
                Format::Plain => print(&format!("member {} removed\n", args.id)),
                Format::Table => output::row(["ID", "REMOVED"], [args.id.to_string(), "true".to_owned()]),
            }
        }
        MemberCommand::Promote { id } => show(session, "promoted", &client.promote_member(*id).await?),
        MemberCommand::Update(args) => {
            let fields = [
                ("peer_url", &args.peer_url),
                ("client_url", &args.described.client_url),
                ("name", &args.described.name),
            ];
            let fields = fields
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), Value::from(value.clone()?))));
            let fields = fields.collect::<Map<_, _>>();
            if fields.is_empty() {
                return Err(CliError::Usage(
                    "nothing is to be changed: give at least one of --peer-url, --client-url and --name".to_owned(),
                ));
            }
            let fields = Value::Object(fields);
            show(session, "updated", &client.update_member(args.id, &fields).await?)
        }
        MemberCommand::Replace(args) => {
            let add = new_member(args.id, args.address.url(), &args.described, false);
            let (member, done) = client.replace_member(args.remove, &add).await?;
            let what = if done {
                "in place"
            } else {
                "is catching up; `metcd member list` shows when it has replaced the other"
            };
            show(session, what, &member)
        }
    }
}

fn show(session: &Session, what: &str, member: &Member) -> Result<(), CliError> {
    match session.format {
        Format::Json => output::json(member),
        Format::Plain => print(&format!("member {} {what}\n", member.id)),
        Format::Table => table(None, std::slice::from_ref(member)),
    }
}

/// Prints members for the shell too.
pub(super) fn list(session: &Session, members: &Members) -> Result<(), CliError> {
    match session.format {
        Format::Json => output::json(members),
        Format::Plain | Format::Table => table(members.leader, &members.members),
    }
}

fn table(leader: Option<u64>, members: &[Member]) -> Result<(), CliError> {
    let mut table = Table::new(&["ID", "NAME", "ROLE", "HEALTHY", "CLIENT", "PEER"]);
    for member in members {
        let role = match &member.wanted_role {
            Some(wanted) => format!("{}, to be {wanted}", member.role),
            None if Some(member.id) == leader => format!("{}, leader", member.role),
            None => member.role.clone(),
        };
        let healthy = match member.healthy {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "?",
        };
        let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        table.row([
            member.id.to_string(),
            or_dash(&member.name),
            role,
            healthy.to_owned(),
            or_dash(&member.client_url),
            or_dash(&member.peer_url),
        ]);
    }
    table.print()
}

pub(super) async fn leader(session: &Session, command: &LeaderCommand) -> Result<(), CliError> {
    let leader = match command {
        LeaderCommand::Show => session.client.leader().await?,
        LeaderCommand::Transfer { id } => session.client.transfer_leader(*id).await?,
    };
    let Leader { id, term, client_url } = &leader;
    let url = client_url.as_deref().unwrap_or("-");
    match session.format {
        Format::Json => output::json(&leader),
        Format::Plain => print(&format!("{id}\n")),
        Format::Table => {
            let mut table = Table::new(&["ID", "TERM", "CLIENT"]);
            table.row([id.to_string(), term.to_string(), url.to_owned()]);
            table.print()
        }
    }
}
