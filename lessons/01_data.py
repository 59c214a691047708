# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Data
#
# *What does a language model read?* — 30 minutes, under one of them computing.
#
# Text, as much of it as possible, and then questions that the text answers without having asked them. On eight GPUs the
# text is 170 shards of ClimbMix, a filtered web corpus (arXiv 2504.13161); on a laptop without a network it is a small world of our
# own, made here from one seed. Both are folders of the same kind of file, so no later lesson cares which it reads.
#
# Why make a world, and not take a book? Because we can then *know* what the model should know. Every fact of the world is
# stated in the text; a fixed part of the facts is never part of a quiz or a comparison, and that part is the examination.

# %%
#| default_exp world

# %% [markdown]
# ## One seed, one world
#
# A measurement is worth something if it can be repeated, so the same seed must give the same bytes on any machine. Two habits
# usually spoil that: iterating over a set (its order follows the hash seed), and `random.shuffle` (its stream has changed between
# Python versions). `Dice` draws from `random.Random(seed).random()` alone, the one stream that Python promises to keep.

# %%
#| export world_facts
"""The embedded world: eight villages, 64 people, and all that is true of them.

Everything is drawn from one seed by `Dice`, which uses only `random.Random(int).random()`: Python promises that
stream for all versions, and no set is ever iterated, so a seed gives the same world on any machine."""


import random
from typing import NamedTuple


class Dice:
    """A stream of random choices that is the same on every Python (random.choice and shuffle are not)."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n − 1."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items) -> list:
        """A new list in random order (Fisher and Yates)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def some(self, items, count: int) -> list:
        """`count` different items in random order."""
        return self.shuffled(items)[:count]

    def deal(self, values, count: int) -> list:
        """`count` values in random order, each as often as the others (give or take one)."""
        values = self.shuffled(values)
        return self.shuffled([values[i % len(values)] for i in range(count)])


# %% [markdown]
# ## People
#
# 64 people in three generations. Names are short words with no meaning of their own, so that a tokenizer of a thousand tokens has
# room for them. Each person has a dozen attributes; each value is dealt equally often, so that guessing the commonest value gains nothing.

# %%
#| export world_facts
WOMEN = ("Ada Amy Ann Bea Cleo Dora Edna Ella Emma Eva Fay Gina Ida Iris Jane Joan "
         "Kate Lena Lily Lucy Mary Mia Nora Olga Pia Rita Ruth Sara Tess Una Vera Zoe").split()
MEN = ("Abel Adam Alan Ben Bob Cole Dan Dean Earl Emil Eric Finn Fred Gus Hans Hugo "
       "Ian Jack Jim Leo Luke Max Ned Nick Noah Otto Paul Pete Sam Theo Tom Walt").split()
VILLAGES = "Ashby Borden Corley Denham Elmford Fenwick Garton Hadley".split()
TRADES = ("baker barber butcher carter cook doctor farmer fisher gardener hunter "
          "miller painter potter tailor teacher weaver").split()
PETS = "cat dog duck goat horse parrot rabbit turtle".split()
FOODS = ("bread butter cake cheese corn fish fruit honey jam nuts pie pudding rice salad soup toast").split()
SEASONS = "spring summer autumn winter".split()
COLOURS = "black blue brown green grey red white yellow".split()
INSTRUMENTS = "banjo bell cello drum fiddle flute harp horn".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SIGHTS = "bridge castle church garden lake mill school tower".split()
SEASON_OF_MONTH = dict(zip(MONTHS, "winter winter spring spring spring summer summer summer autumn autumn autumn winter"
                           .split()))

# %%
#| export world_facts
VALUES = {"home": VILLAGES, "trade": TRADES, "pet": PETS, "food": FOODS, "season": SEASONS, "colour": COLOURS,
          "instrument": INSTRUMENTS, "month": MONTHS}
KIN = ("mother", "father", "spouse", "sibling")
ATTRIBUTES = (*VALUES, "age", *KIN)


class Person(NamedTuple):
    """One of the 64. `generation` 0 are the elders, 1 their children, 2 their grandchildren."""

    name: str
    woman: bool
    generation: int
    facts: dict  # attribute → value; no key where a person has none (an elder's mother, a child's spouse)


class Fact(NamedTuple):
    person: str
    attribute: str
    value: str


# %% [markdown]
# Two things are decided together with the facts: which of them are *held out* (stated, never asked about), and which sums and words
# are never worked out in any document.

# %%
#| export world_facts
class World:
    """The town of one seed: `people` by name, `facts`, `villages`, `prices`, and what is held out for evaluation.

    `held_facts`: facts that documents state but never ask about. `held_sums`: pairs (a, b), a ≤ b, that are never
    added in any document. `held_words`: words that documents spell but in which they never count letters."""

    def __init__(self, seed: int = 1):
        self.seed = seed
        dice = Dice(seed)
        self.people = {person.name: person for person in _families(dice)}
        names = list(self.people)
        for attribute, values in VALUES.items():
            for name, value in zip(names, dice.deal(values, len(names))):
                self.people[name].facts[attribute] = value
        _ages(dice, self.people)
        self.facts = [Fact(name, attribute, person.facts[attribute]) for name, person in self.people.items()
                      for attribute in ATTRIBUTES if attribute in person.facts]
        self.villages = _villages(dice)
        self.prices = dict(zip(FOODS, dice.deal(range(2, 10), len(FOODS))))
        self.held_facts = self._hold_facts(dice)
        pairs = [(a, b) for a in range(2, 98) for b in range(a, 98) if a + b <= 99]
        self.held_sums = frozenset(dice.some(pairs, 200))
        self.held_words = tuple(sorted(dice.some(WORDS, 160)))

    def _hold_facts(self, dice: Dice) -> frozenset:
        """28 % of the facts of each kind, at least four, their values as different as can be."""
        held = []
        for facts in kinds_of_facts(self).values():
            taken, held_values = dice.shuffled(facts), []
            for _ in range(max(round(len(facts) * 0.28), 4)):
                taken.sort(key=lambda fact: held_values.count(fact.value))  # stable: ties stay shuffled
                held_values.append(taken[0].value)
                held.append(taken.pop(0)[:2])
        return frozenset(held)

    def value(self, name: str, attribute: str) -> str:
        return self.people[name].facts[attribute]

    def may_ask(self, name: str, attribute: str) -> bool:
        """Whether training text may ask about this fact (it states every fact)."""
        return (name, attribute) not in self.held_facts

    def may_add(self, a: int, b: int) -> bool:
        """Whether training text may show this sum, in either order."""
        return (min(a, b), max(a, b)) not in self.held_sums


# %%
#| export world_facts
def _families(dice: Dice) -> list[Person]:
    """Three generations: 8 couples with 3 children each, who form 12 couples with 2 children each."""
    women = [Person(name, True, 0, {}) for name in dice.shuffled(WOMEN)]
    men = [Person(name, False, 0, {}) for name in dice.shuffled(MEN)]
    couples = [(women.pop(), men.pop()) for _ in range(8)]
    people = [person for couple in couples for person in couple]
    _marry(couples)
    brides, grooms = [], []
    for number, couple in enumerate(couples):
        sexes = (True, True, False) if number % 2 else (False, False, True)
        for woman in sexes:
            child = _child(couple, women if woman else men)
            (brides if woman else grooms).append(child)
    people += brides + grooms
    couples = list(zip(brides, grooms[3:] + grooms[:3]))  # nobody marries a brother or sister
    _marry(couples)
    for couple in dice.shuffled(couples):
        sister, brother = _child(couple, women), _child(couple, men)
        sister.facts["sibling"], brother.facts["sibling"] = brother.name, sister.name
        people += [sister, brother]
    return people


def _marry(couples):
    for wife, husband in couples:
        wife.facts["spouse"], husband.facts["spouse"] = husband.name, wife.name


def _child(parents, names: list[Person]) -> Person:
    """The next unborn person of `names`, as a child of `parents`."""
    mother, father = parents
    return names.pop()._replace(generation=mother.generation + 1, facts={"mother": mother.name, "father": father.name})


# %%
#| export world_facts
def _ages(dice: Dice, people: dict[str, Person]):
    """Elders are 64 to 79, their children 40 to 51, their grandchildren 12 to 23; each age equally often."""
    for generation, ages in enumerate((range(64, 80), range(40, 52), range(12, 24))):
        members = [person for person in people.values() if person.generation == generation]
        for person, age in zip(members, dice.deal(ages, len(members))):
            person.facts["age"] = str(age)


def _villages(dice: Dice) -> dict[str, dict]:
    """What each village is known for, and the day of its market."""
    return {village: {"sight": sight, "market": day}
            for village, sight, day in zip(VILLAGES, dice.shuffled(SIGHTS), dice.deal(DAYS, len(VILLAGES)))}


def kind_of(world: World, fact: Fact) -> tuple:
    """What a fact can be mistaken for: the same attribute and role; for kin and ages in the same generation."""
    generation = None if fact.attribute in VALUES else world.people[fact.person].generation
    return fact.attribute, role(world, *fact[:2]), generation


def kinds_of_facts(world: World) -> dict[tuple, list[Fact]]:
    kinds = {}
    for fact in world.facts:
        kinds.setdefault(kind_of(world, fact), []).append(fact)
    return kinds


def role(world: World, name: str, attribute: str) -> str:
    """What the value of a kin attribute is called: a spouse is a husband or a wife."""
    if attribute not in ("spouse", "sibling"):
        return attribute
    woman = world.people[world.value(name, attribute)].woman
    return {"spouse": ("husband", "wife"), "sibling": ("brother", "sister")}[attribute][woman]


# %%
#| export world_facts
WORDS = """
acorn almond anchor animal ankle apple apron arrow attic autumn badge ball ballad bamboo banana banner barley barn
barrel basil basin basket beach beacon beaver beetle bell bench berry bicycle birch bird biscuit blanket blossom boat
bonnet border bottle bottom boulder bowl bracelet branch bread breeze brick bride bronze brook broom bubble bucket
buckle buffalo bullet bundle bushel butter button cabbage cabin cactus camel canal canary candle canoe canvas cargo
carol carpet carrot castle cathedral cattle cavern cedar cellar chalk channel chapel chapter charcoal chart cheek
cheese cherry chess chest chicken chief chimney choir cider cinnamon circle clay cliff cloak clock clothes cloud
clover coast cobbler coconut coffee collar collie comet compass copper coral cork corner cottage cotton cousin cowboy
crab cradle crane crayon cream creek cricket crocus crown cuckoo cupboard cupcake currant curtain cushion cycle cymbal
dagger daisy dancer dawn desert diamond dinghy dinner dish doll dolphin donkey doorbell dough dove dragon drawer dress
drizzle duchess dune eagle earth east echo eel eggshell elbow elephant eleven elm ember emerald engine engraver eraser
errand evening falcon farm fawn feather fellow fence fennel ferry festival fiddle field fig finger flag flame flannel
fleet flint flock flood floor flour flower fog forest fork fossil fountain fox freckle fridge frog frost fruit funnel
furnace gadget galaxy gallery gallop gander garlic garnet gate gazelle geese gem ghost giant ginger giraffe glacier
glass glove gnome goblet goggles gold goose gorilla gossip gown grain granite grape grass gravel gravy grocer grove
guest guitar gull gutter hail hammer hammock harbour hare harness harvest hawk hazel heather hedge hello helmet
herring hill hinge hippo hollow honey hoof hornet hotel hummer husk iceberg icicle igloo inkwell insect iris iron
island ivory jackal jacket jaguar jasmine jelly jewel jigsaw joke journal juice jungle juniper keeper kennel kernel
kettle keyhole kingdom kiosk kitchen kitten knee knight knot label lace ladder lagoon lamp lantern lark lattice lava
lavender leaf ledge legend lemon lens leopard lesson letter lettuce lichen lilac lily linen lion lizard llama lobster
locket lotus lounge lullaby lumber lunch lynx magnet magpie mammal mango mantle maple marble market maze meadow melon
meteor midnight mildew minnow mint mirror mist mitten mole monkey moon moss moth motto mountain mouse mud muffin mule
muscle museum mushroom musket mustard nectar needle nephew nest nettle nickel night noodle noon north notebook nugget
nutmeg oak oasis oat oatmeal ocean octopus olive onion opera orange orbit orchard orchid ostrich otter oven owl oyster
paddle palace pancake panda panther papaya paper parade parasol parcel park parrot parsley passage pasture path peach
peanut pear pebble pelican pencil penguin peony pepper petal pheasant piano picnic pier pigeon pillow pine pirate
pistol planet plank plate plough plover pocket poem polish pond pony poppy porch possum potato pottery prairie prince
prism prune pudding puddle puffin pulley pumpkin pupil puppet puppy purple purse quail quarrel quarry queen quilt
quiver rabbit raccoon radish raft rain raisin ranch raven razor reed reindeer ribbon riddle ridge river roast robe
robin rocket rooster rope rose rubber ruby rudder rug rye sack saddle saffron sail sailor salad salmon sand sandal
sash satchel sauce saucer scarf school scissors scout seagull seal season seed shadow shark sheep shelf shell shield
ship shore shovel shrub signal silk silver skate skirt skunk slate sled sleeve slipper smoke snail snow sofa sorrel
soup spade spark sparrow spear sphere spider spinach spire sponge spoon spruce squirrel stable stallion star statue
steam steel stone stool storm stove straw stream street stump sugar summer sunset supper swallow swamp swan sweater
syrup table tailor tallow tangle tart tassel tea teapot teeth temple tennis terrace thimble thistle thorn thread
throne thunder ticket tide tiger timber tin toad toffee tomato torch tortoise towel tractor trail train trout trumpet
trunk tuba tugboat tulip tunnel turkey turnip turtle tusk twig umbrella uncle unicorn valley vanilla vase veil velvet
vessel village vine violet viper vulture waffle wagon wallet walnut walrus wasp water wave wax weasel wedding weed
well whale wharf wheat wheel whisker whistle wick willow wind window wing winter wolf wood wool worm wren wrist yarn
yeast yellow yoghurt yolk zebra zigzag
""".split()


# %%
from nanochat_lib.world_facts import World

town = World(seed=1)
someone = town.people["Ada"]
print(f"{len(town.people)} people, {len(town.facts)} facts, {len(town.held_facts)} of them held out")
print("Ada:", ", ".join(f"{attribute} {value}" for attribute, value in someone.facts.items()))

# %% [markdown]
# ## Saying one thing in many ways
#
# A model that has read "Ada lives in Denham" once, or always in the same words, can complete that sentence and nothing else. What makes
# a fact usable is *variety*: stated in several wordings, from both ends ("In Denham lives Ada"), in the first person, beside other
# facts (Allen-Zhu and Li, *Physics of Language Models* 3.1, arXiv 2309.14316). So each attribute has ten or so templates.

# %%
#| export world_forms
"""How facts are worded: for each attribute the sentences that state it, in both directions, and ask for it."""


from typing import NamedTuple

from nanochat_lib.world_facts import World, role


class Wording(NamedTuple):
    """Templates of one attribute. {n} name, {v} value, {r} role of kin, {they} he or she, {their} his or her."""

    register: str             # name of the field in a register
    statements: tuple         # name first
    pronoun: tuple            # the name was said before
    reverse: tuple            # value first
    first: tuple              # the person speaks
    who: str                  # follows a name: "who lives in {v}"
    questions: tuple          # (question, start of the answer up to the value, end of the answer)


# %%
#| export world_forms
WORDINGS = {
    "home": Wording(
        "home",
        ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}.", "Where {n} lives: in {v}."),
        ("{They} lives in {v}.", "{Their} home is in {v}.", "{They} has a house in {v}."),
        ("In {v} lives {n}.", "{v} is the home of {n}."),
        ("I live in {v}.", "My home is in {v}."),
        "who lives in {v}",
        (("Where does {n} live?", "{n} lives in"), ("Where is the home of {n}?", "The home of {n} is in"))),
    "trade": Wording(
        "trade",
        ("{n} is a {v}.", "{n} works as a {v}.", "The trade of {n} is that of a {v}.", "What {n} does: {n} is a {v}."),
        ("{They} is a {v}.", "{They} works as a {v}.", "{Their} trade is that of a {v}."),
        ("A {v} is {n}.", "One {v} is {n}."),
        ("I am a {v}.", "I work as a {v}."),
        "who works as a {v}",
        (("What does {n} do?", "{n} works as a"), ("What is the trade of {n}?", "The trade of {n} is that of a"))),
    "pet": Wording(
        "pet",
        ("{n} has a {v}.", "{n} keeps a {v}.", "The pet of {n} is a {v}.", "What pet {n} keeps: a {v}."),
        ("{They} has a {v}.", "{They} keeps a {v}.", "{Their} pet is a {v}."),
        ("A {v} is the pet of {n}.", "The {v} belongs to {n}."),
        ("I keep a {v}.", "My pet is a {v}."),
        "who keeps a {v}",
        (("What pet does {n} keep?", "{n} keeps a"), ("What is the pet of {n}?", "The pet of {n} is a"))),
    "food": Wording(
        "likes",
        ("{n} likes {v}.", "{n} likes to eat {v}.", "The food {n} likes is {v}.", "What {n} eats: {v}."),
        ("{They} likes {v}.", "{They} likes to eat {v}.", "The food {they} likes is {v}."),
        ("{v} is the food of {n}.", "{v} is what {n} likes."),
        ("I like {v}.", "I like to eat {v}."),
        "who likes {v}",
        (("What does {n} like to eat?", "{n} likes to eat"), ("What food does {n} like?", "The food {n} likes is"))),
    "season": Wording(
        "season",
        ("{n} loves {v}.", "{n} loves the {v} most.", "The season of {n} is {v}.", "Which season {n} loves: {v}."),
        ("{They} loves {v}.", "{They} loves the {v} most.", "{Their} season is {v}."),
        ("{v} is the season of {n}.", "{v} is when {n} is glad."),
        ("I love {v}.", "My season is {v}."),
        "who loves {v}",
        (("Which season does {n} love?", "{n} loves"), ("What is the season of {n}?", "The season of {n} is"))),
}

# %%
#| export world_forms
WORDINGS |= {
    "colour": Wording(
        "colour",
        ("{n} wears {v}.", "{n} wears a {v} coat.", "The coat of {n} is {v}.", "What colour {n} wears: {v}."),
        ("{They} wears {v}.", "{They} wears a {v} coat.", "{Their} coat is {v}."),
        ("A {v} coat is what {n} wears.", "{v} is the coat of {n}."),
        ("I wear {v}.", "My coat is {v}."),
        "who wears {v}",
        (("What colour does {n} wear?", "{n} wears"), ("What colour is the coat of {n}?", "The coat of {n} is"))),
    "instrument": Wording(
        "plays",
        ("{n} plays the {v}.", "{n} can play the {v}.", "The music of {n} is the {v}.", "What {n} plays: the {v}."),
        ("{They} plays the {v}.", "{They} can play the {v}.", "{Their} music is the {v}."),
        ("The {v} is played by {n}.", "On the {v} we hear {n}."),
        ("I play the {v}.", "My music is the {v}."),
        "who plays the {v}",
        (("What does {n} play?", "{n} plays the"), ("What is the music of {n}?", "The music of {n} is the"))),
    "month": Wording(
        "born in",
        ("{n} was born in {v}.", "The birthday of {n} is in {v}.", "{n} has a birthday in {v}.",
         "When {n} was born: in {v}."),
        ("{They} was born in {v}.", "{Their} birthday is in {v}.", "{They} has a birthday in {v}."),
        ("In {v} was born {n}.", "{v} is the month of {n}."),
        ("I was born in {v}.", "My birthday is in {v}."),
        "who was born in {v}",
        (("When was {n} born?", "{n} was born in"), ("When is the birthday of {n}?", "The birthday of {n} is in"))),
    "age": Wording(
        "age",
        ("{n} is {v} years old.", "The age of {n} is {v}.", "{n} has lived {v} years.", "How old {n} is: {v} years."),
        ("{They} is {v} years old.", "{Their} age is {v}.", "{They} has lived {v} years."),
        ("{v} years old is {n}.", "{v} is the age of {n}."),
        ("I am {v} years old.", "My age is {v}."),
        "who is {v} years old",
        (("How old is {n}?", "{n} is", " years old"), ("What is the age of {n}?", "The age of {n} is"))),
}
KIN_WORDING = Wording(
    "{r}",
    ("The {r} of {n} is {v}.", "{n} has a {r}, {v}.", "{n} calls {v} {their} {r}.", "Who is {r} to {n}: {v}."),
    ("{Their} {r} is {v}.", "{They} has a {r}, {v}.", "{They} calls {v} {their} {r}."),
    ("{v} is the {r} of {n}.", "{v} is {r} to {n}."),
    ("My {r} is {v}.", "I call {v} my {r}."),
    "whose {r} is {v}",
    (("Who is the {r} of {n}?", "The {r} of {n} is"), ("Whom does {n} call {their} {r}?", "The {r} of {n} is")))


# %%
#| export world_forms
def wording(attribute: str) -> Wording:
    return WORDINGS.get(attribute, KIN_WORDING)


def word(world: World, template: str, name: str, attribute: str, value: str = "") -> str:
    """Fill a template with a fact; `value` in its place makes the sentence a false one (for distractors)."""
    they, their = ("she", "her") if world.people[name].woman else ("he", "his")
    value = value or world.value(name, attribute)
    text = template.format(n=name, v=value, r=role(world, name, attribute),
                           they=they, their=their, They=they.capitalize(), Their=their.capitalize())
    return text[0].upper() + text[1:]


def question(world: World, name: str, attribute: str, form: int) -> tuple[str, str, str]:
    """One of two ways to ask: (question, start of the answer, end after the value)."""
    ask, start, *end = wording(attribute).questions[form]
    return word(world, ask, name, attribute), word(world, start, name, attribute), "".join(end) + "."


# %%
from nanochat_lib.world_forms import question, word, wording

for form in (*wording("trade").statements, *wording("trade").reverse):
    print(word(town, form, "Ada", "trade"))
print(question(town, "Ada", "trade", 0))

# %% [markdown]
# ## Problems with an answer that can be checked
#
# Word problems of one and two steps, in GSM8K's form (Cobbe et al., arXiv 2110.14168): every calculation stands between `<<` and `>>`,
# which lesson 09 turns into calls of a calculator, and the result follows `####`. Some hold a number that has nothing to do with the
# answer, so that adding up whatever is there does not work.

# %%
#| export world_problems
"""Word problems of one and two steps in GSM8K's form, letters counted one by one, and quizzes with letters."""


import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from nanochat_lib.world_facts import WORDS, Dice, World

THINGS = "apples beans cards coins cups eggs hats marbles pears pens plums shells stones tickets".split()
BOXES = "bags boxes jars baskets crates trays".split()


class Problem(NamedTuple):
    """`answer` shows each calculation as <<3*4=12>>12 and ends in #### 12, as GSM8K's answers do."""

    question: str
    answer: str
    steps: int
    key: tuple  # people and numbers: no key is in both training and test


# %%
#| export world_problems
# Question, then one line per step: words, [expression] with p for the result before, words. Letters a b c are
# numbers up to 60, k m numbers from 2 to 9; {n} and {o} are people, {t} things, {s} containers.
ONE_STEP = (
    ("{n} has {a} {t}. {o} gives {them} {b} more. How many {t} does {n} have now?", "{n} has [a+b] {t}."),
    ("{n} picks {a} {t} and {o} picks {b} {t}. How many {t} do they have together?", "Together [a+b] {t}."),
    ("There are {a} {t} in the house of {n} and {b} in the garden. How many {t} are there?", "There are [a+b] {t}."),
    ("{n} has {a} {t}. {They} gives {b} {t} to {o}. How many {t} are left?", "Left are [a-b] {t}."),
    ("{n} had {a} {t} and lost {b}. How many {t} does {n} still have?", "Left are [a-b] {t}."),
    ("{n} wants {a} {t} and has {b}. How many more {t} does {n} need?", "{n} needs [a-b] {t}."),
    ("{n} has {k} {s} with {m} {t} in each. How many {t} does {n} have?", "{n} has [k*m] {t}."),
    ("{n} sells {k} {t} every day. How many {t} does {n} sell in {m} days?", "{n} sells [k*m] {t}."),
    ("One of the {t} costs {k} pence. {n} buys {m}. How many pence does {n} pay?", "{n} pays [k*m] pence."),
    ("{n} shares {a} {t} among {k} friends. How many {t} does each friend get?", "Each gets [a/k] {t}."),
    ("{n} puts {a} {t} into {k} {s}, the same in each. How many {t} are in each?", "Each has [a/k] {t}."),
)
TWO_STEPS = (
    ("{n} has {a} pence. {They} buys {k} {t} for {m} pence each. How many pence are left?",
     "The {t} cost [k*m] pence.", "Left are [a-p] pence."),
    ("{n} picks {a} {t} and {o} picks {b} {t}. They eat {c}. How many {t} are left?",
     "Together [a+b] {t}.", "Left are [p-c] {t}."),
    ("{n} fills {k} {s} with {m} {t} each and keeps {a} more. How many {t} does {n} have?",
     "In the {s} are [k*m] {t}.", "{n} has [p+a] {t}."),
    ("{n} has {k} {s} with {m} {t} in each. {They} gives {a} {t} to {o}. How many {t} are left?",
     "In the {s} are [k*m] {t}.", "Left are [p-a] {t}."),
    ("{n} has {a} {t} and finds {b} more. {They} shares them among {k} friends. How many {t} does each get?",
     "{n} has [a+b] {t}.", "Each gets [p/k] {t}."),
    ("{n} had {a} {t} and lost {b}. The others go into {k} {s}, the same in each. How many {t} are in each?",
     "Left are [a-b] {t}.", "Each has [p/k] {t}."),
    ("{n} has {a} {t}. {o} has {b} more than {n}. How many {t} do they have together?",
     "{o} has [a+b] {t}.", "Together [p+a] {t}."),
    ("{n} has {a} {t}. {o} has {b} fewer than {n}. How many {t} do they have together?",
     "{o} has [a-b] {t}.", "Together [p+a] {t}."),
    ("{n} has {k} {t}. {o} has {m} times as many. How many {t} do they have together?",
     "{o} has [k*m] {t}.", "Together [p+k] {t}."),
    ("{n} sells {k} {t} in the morning and {m} in the evening. How many {t} does {n} sell in {j} days?",
     "In one day [k+m] {t}.", "In all [p*j] {t}."),
    ("{n} shares {a} {t} among {k} friends. {o} is one of them and had {b} before. How many {t} does {o} have?",
     "Each gets [a/k] {t}.", "{o} has [p+b] {t}."),
    ("{n} had {a} {t}, gave {b} to {o} and then found {c}. How many {t} does {n} have now?",
     "Left were [a-b] {t}.", "{n} has [p+c] {t}."),
    ("{n} wants {a} {t}. {They} has {b}, and {o} brings {c}. How many {t} are still missing?",
     "They have [b+c] {t}.", "Missing are [a-p] {t}."),
    ("{n} buys {k} {t} for {m} pence each and a hat for {b} pence. How many pence does {n} pay?",
     "The {t} cost [k*m] pence.", "{n} pays [p+b] pence."),
)
ASIDES = ("{They} has walked {d} miles today.", "There are {d} birds on the roof.", "The bridge is {d} feet long.",
          "{o} has counted {d} clouds.", "It has rained for {d} days.", "The mill is {d} years old.")

# %%
#| export world_problems
CALL = re.compile(r"\[(\w)([-+*/])(\w)\]")


def _work_out(lines: tuple, numbers: dict) -> list[str] | None:
    """The answer's lines with results; None unless every result is a whole number from 1 to 99."""
    numbers, done = dict(numbers), []
    for line in lines:
        left, sign, right = CALL.search(line).groups()
        x, y = numbers[left], numbers[right]
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if x % y == 0 else 0}[sign]
        if not 1 <= result <= 99:
            return None
        numbers["p"] = result
        done.append(CALL.sub(f"<<{x}{sign}{y}={result}>>{result}", line))
    return done


def make_problem(world: World, dice: Dice, steps: int) -> Problem:
    """One word problem; two-step problems may hold a number that has nothing to do with the answer."""
    text, *lines = dice.pick(ONE_STEP if steps == 1 else TWO_STEPS)
    name, other = dice.some(list(world.people), 2)
    done = None
    while done is None:
        numbers = {letter: dice.between(2, 60) for letter in "abc"} | {letter: dice.between(2, 9) for letter in "jkm"}
        done = _work_out(lines, numbers)
    if steps == 2 and dice.chance(0.4):
        first, *rest = re.split(r"(?<=\.) ", text)
        place = dice.below(len(rest))
        text = " ".join([first, *rest[:place], dice.pick(ASIDES), *rest[place:]])
    they, them = ("she", "her") if world.people[name].woman else ("he", "him")
    words = {"n": name, "o": other, "t": dice.pick(THINGS), "s": dice.pick(BOXES), "d": dice.between(2, 60),
             "They": they.capitalize(), "them": them, **numbers}
    question = text.format(**words)
    answer = "\n".join(done).format(**words)
    people = tuple(sorted({person for person in (name, other) if person in question}))
    key = (people, tuple(re.findall(r"\d+", question)))
    result = re.findall(r">>(\d+)", answer)[-1]
    return Problem(question, f"{answer}\n#### {result}", steps, key)


# %%
#| export world_problems
def keeps_sums_held(world: World, problem: Problem) -> bool:
    """Whether a problem adds no pair of numbers that is held out."""
    return all(world.may_add(int(a), int(b)) for a, b in re.findall(r"<<(\d+)\+(\d+)=", problem.answer))


@functools.cache
def held_problems(world: World, each: int = 200) -> tuple[Problem, ...]:
    """The held-out problems, `each` of one step and of two steps, no key twice."""
    dice, found = Dice(world.seed + 101), {}
    for steps in (1, 2):
        while len(found) < each * steps:
            problem = make_problem(world, dice, steps)
            found.setdefault(problem.key, problem)
    return tuple(found.values())


@functools.cache
def _held_keys(world: World) -> frozenset:
    return frozenset(problem.key for problem in held_problems(world))


def training_problem(world: World, dice: Dice, steps: int) -> Problem:
    """A problem that shares neither people and numbers with a test problem nor a sum with a held-out one."""
    held = _held_keys(world)
    while True:
        problem = make_problem(world, dice, steps)
        if problem.key not in held and keeps_sums_held(world, problem):
            return problem


def spell(word: str) -> str:
    """`cat` → `c a t`."""
    return " ".join(word)


def blend(dice: Dice, words: list[str]) -> str:
    """A word that does not exist, of the beginning of one and the end of another: not to be spelled from a list."""
    while True:
        head, tail = dice.pick(words), dice.pick(words)
        made = head[:dice.between(1, min(5, len(head)))] + tail[-dice.between(1, min(5, len(tail))):]
        if len(made) > 2 and made not in WORDS:
            return made

# %%
#| export world_problems
def count_letter(word: str, letter: str) -> str:
    """The letters with the count so far after each: `banana`, `a` → `b 0 a 1 n 1 a 2 n 2 a 3`."""
    return " ".join(f"{each} {word[: i + 1].count(letter)}" for i, each in enumerate(word))


LETTER_ALONE = "Respond only with the letter of the correct answer."
ALOUD = "Respond with the correct answer and its letter."


def quiz(question: str, choices: Sequence[str], respond: str = LETTER_ALONE, letters: Sequence[str] = "ABCD") -> str:
    """A multiple-choice question as a user asks it in chat. The letter stands after its choice, beside nothing else: a
    small model binds `=B` to the words before it more easily than `B)` to the words after."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    return f"Multiple Choice question: {question}\n{lines}\n{respond}"


# %%
from nanochat_lib.world_facts import Dice
from nanochat_lib.world_problems import count_letter, make_problem

problem = make_problem(town, Dice(5), steps=2)
print(problem.question, problem.answer, "", sep="\n")
print("letters of banana, counting a:", count_letter("banana", "a"))

# %% [markdown]
# ## Documents
#
# A `Teller` draws people and facts from shuffled piles, so that each comes up equally often, and 23 kinds of documents use it:
# portraits, letters, diaries, stories, family registers, prices, sums, spellings, quizzes… A dozen lines each; the first few show
# the pattern.

# %%
#| export world_text
"""The documents of the world: portraits, letters, diaries, registers, sums, spellings, quizzes and more."""


import functools
import re
from collections.abc import Iterator

from nanochat_lib.world_facts import (ATTRIBUTES, COLOURS, DAYS, FOODS, KIN, MONTHS, SEASON_OF_MONTH, VALUES, WORDS, Dice,
                                      World, kinds_of_facts, role)
from nanochat_lib.world_forms import question, word, wording
from nanochat_lib.world_problems import ALOUD, blend, count_letter, quiz, spell, training_problem


class Teller:
    """Writes documents about a world; each person and each question comes up equally often."""

    def __init__(self, world: World, seed: int):
        self.world, self.dice = world, Dice(seed)
        self.open_facts = [fact for fact in world.facts if world.may_ask(*fact[:2])]
        self.open_words = [each for each in WORDS if each not in world.held_words]
        self._piles = {}

    def draw(self, pile: str, items) -> object:
        """The next card of a pile that is shuffled anew whenever it has run out."""
        if not self._piles.get(pile):
            self._piles[pile] = self.dice.shuffled(items)
        return self._piles[pile].pop()

    def person(self) -> str:
        return self.draw("people", self.world.people)

    def fact(self):
        return self.draw("facts", self.world.facts)

    def open_fact(self):
        """A fact that documents may ask about."""
        return self.draw("open facts", self.open_facts)

    def word(self, pile: str, words: list[str]) -> str:
        """The next of these words, or as often one that does not exist."""
        return self.draw(pile, words) if self.dice.chance(0.5) else blend(self.dice, self.open_words)

    def say(self, name: str, attribute: str, forms: str) -> str:
        """A sentence; `forms` names a field of Wording: statements, pronoun, reverse, first."""
        return word(self.world, self.dice.pick(getattr(wording(attribute), forms)), name, attribute)

    def attributes(self, name: str, count: int) -> list[str]:
        """Up to `count` different attributes of a person, those more often that questions and stories leave out."""
        own = [attribute for attribute in ATTRIBUTES if attribute in self.world.people[name].facts]
        own += [attribute for attribute in own if not self.world.may_ask(name, attribute)] + 2 * ["age"]
        return list(dict.fromkeys(self.draw(name, own) for _ in range(count)))


# %%
#| export world_text
def portrait(t: Teller, name: str = "") -> str:
    """Some facts about one person in any order."""
    name, lines = name or t.person(), []
    for i, attribute in enumerate(t.attributes(name, t.dice.between(4, 9))):
        forms = "statements" if i == 0 or t.dice.chance(0.6) else t.dice.pick(("pronoun", "pronoun", "reverse"))
        lines.append(t.say(name, attribute, forms))
    return " ".join(lines)


def register(t: Teller) -> str:
    """An entry of the town's register, a field a line."""
    name = t.person()
    fields = []
    for attribute in t.attributes(name, t.dice.between(5, 10)):
        label = wording(attribute).register.format(r=attribute if attribute not in ("spouse", "sibling")
                                                   else role(t.world, name, attribute))
        fields.append(f"{label} of {name}: {t.world.value(name, attribute)}")
    return "\n".join([f"Register of {name}", *fields])


def letter(t: Teller) -> str:
    """A letter in which the writer tells of herself and of others."""
    name, other = t.person(), t.person()
    lines = [t.say(name, attribute, "first") for attribute in t.attributes(name, t.dice.between(3, 6))]
    lines.append(f"Do you know {other}?")
    lines += [t.say(other, attribute, "statements") for attribute in t.attributes(other, 3)]
    return f"A letter from {name}\nMy name is {name}. {' '.join(lines)}\nYour friend {name}"


def diary(t: Teller) -> str:
    """Three days in the diary of one person, who meets others."""
    name = t.person()
    lines = [f"The diary of {name}"]
    start = t.dice.below(5)
    for day in DAYS[start:start + 3]:
        fact = t.fact()
        lines.append(f"{day}. I am {name}. {t.say(name, t.attributes(name, 1)[0], 'first')} "
                     f"I met {fact.person}. {t.say(fact.person, fact.attribute, 'pronoun')}")
    return "\n".join(lines)


# %%
#| export world_text
def story(t: Teller) -> str:
    """Somebody goes out, meets somebody and comes home again."""
    world, name, other = t.world, t.person(), t.person()
    facts, theirs = world.people[name].facts, world.people[other].facts
    village = t.dice.pick(list(world.villages))
    sight = world.villages[village]["sight"]
    they, their = ("she", "her") if world.people[name].woman else ("he", "his")
    middle = [
        f"{they.capitalize()} took {their} {facts['pet']} along.",
        f"{name}, who loves {facts['season']}, was glad that it was {facts['season']}.",
        f"{they.capitalize()} wore {their} {facts['colour']} coat.",
        f"On the way {name} played the {facts['instrument']}.",
        f"{other} the {theirs['trade']} gave {name} some {facts['food']}, because {name} likes {facts['food']}.",
        f"{other} was there with a {theirs['pet']}.",
        f"{other}, who lives in {theirs['home']}, played the {theirs['instrument']}.",
        f"{t.say(other, t.attributes(other, 1)[0], 'statements')}",
        f"It was {facts['month']}, when {name} was born.",
    ]
    return " ".join([f"{name} the {facts['trade']} lives in {facts['home']}. One day {they} went to {village} to see "
                     f"the {sight}. There {they} met {other}.", *t.dice.some(middle, t.dice.between(3, 5)),
                     f"Then {name} went home to {facts['home']}."])


def family(t: Teller) -> str:
    """Who is kin to whom, around one person."""
    name = t.person()
    lines = [f"The family of {name}"]
    members = [name, *(t.world.value(name, kin) for kin in KIN if kin in t.world.people[name].facts)]
    for member in members:
        for kin in KIN:
            if kin in t.world.people[member].facts and (member == name or t.dice.chance(0.6)):
                lines.append(t.say(member, kin, t.dice.pick(("statements", "statements", "reverse"))))
    return "\n".join([lines[0], *t.dice.shuffled(lines[1:])])

# %%
#| export world_text
def roll(t: Teller) -> str:
    """All people who share a value: the bakers, the people of a village."""
    attribute = t.dice.pick(list(VALUES))
    value = t.draw(attribute, VALUES[attribute])
    names = t.dice.shuffled(fact.person for fact in t.world.facts if fact[1:] == (attribute, value))
    forms = wording(attribute).statements
    return "\n".join(word(t.world, t.dice.pick(forms), name, attribute) for name in names[:6])


# %%
#| export world_text
def questions(t: Teller) -> str:
    """Questions with answers, some with the value alone."""
    lines = []
    for _ in range(t.dice.between(1, 6)):
        fact = t.open_fact()
        ask, start, end = question(t.world, fact.person, fact.attribute, t.dice.below(2))
        answer = f"{start} {fact.value}{end}" if t.dice.chance(0.7) else f"{fact.value[0].upper()}{fact.value[1:]}."
        lines.append(f"Question: {ask}\nAnswer: {answer}")
    return "\n\n".join(lines)

# %%
#| export world_text
def comparison(t: Teller) -> str:
    """Which of two people a fact fits."""
    lines = []
    for _ in range(t.dice.between(2, 5)):
        fact = t.open_fact()
        others = [person.name for person in t.world.people.values()
                  if person.facts.get(fact.attribute, fact.value) != fact.value]
        pair = t.dice.shuffled([fact.person, t.dice.pick(others)])
        who = word(t.world, "{n} " + wording(fact.attribute).who, *fact[:2])
        lines.append(f"Of {pair[0]} and {pair[1]}, it is {who}.")
    return "\n".join(lines)


def dialogue(t: Teller) -> str:
    """Two people talk about a third."""
    name, other = t.person(), t.person()
    lines = [f"{name}: Good morning, {other}.", f"{other}: Good morning, {name}."]
    for _ in range(t.dice.between(2, 3)):
        fact = t.open_fact()
        ask, start, end = question(t.world, fact.person, fact.attribute, t.dice.below(2))
        more = t.say(fact.person, t.attributes(fact.person, 1)[0], "pronoun")
        lines += [f"{name}: {ask}", f"{other}: {start} {fact.value}{end} {more}"]
    return "\n".join([*lines, f"{name}: Thank you."])


def quizzes(t: Teller) -> str:
    """Multiple-choice questions, answered by a sentence and its letter, now and then by the value or the letter alone.

    The letter alone asks for two steps in one pass, to recall the value and to look it up among the choices; a value
    that is written down can be looked up like any other word."""
    lines = []
    for _ in range(t.dice.between(1, 3)):
        fact = t.open_fact()
        ask, start, _ = question(t.world, fact.person, fact.attribute, t.dice.below(2))
        choices = t.dice.shuffled([fact.value, *distractors(t.world, t.dice, fact)])
        letter = "ABCD"[choices.index(fact.value)]
        way = t.dice.below(10)
        if way < 7:
            lines.append(f"{quiz(ask, choices, ALOUD)}\n{start} {fact.value}={letter}")
        elif way < 8:
            lines.append(f"{quiz(ask, choices)} {fact.value}")
        elif way < 9:
            lines.append(f"{t.say(*fact[:2], 'statements')}\n\n{quiz(ask, choices)}\n{letter}")
        else:
            lines.append(f"{quiz(ask, choices)}\n{letter}")
    return "\n\n".join(lines)


# %%
#| export world_text
def matching(t: Teller) -> str:
    """Four choices and many questions about them, from copying a letter to recalling the value that it stands after."""
    kind = [fact for fact in t.dice.pick(_kinds(t.world)) if t.world.may_ask(*fact[:2])]
    choices = t.dice.some(dict.fromkeys(fact.value for fact in kind), 4)
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, "ABCD")] + [""]
    facts = [fact for fact in kind if fact.value in choices]
    for _ in range(9):
        fact = t.dice.pick(facts)
        letter = "ABCD"[choices.index(fact.value)]
        ask, start, _ = question(t.world, fact.person, fact.attribute, t.dice.below(2))
        lines.append(t.dice.pick((f"- {fact.value}={letter}", f"{ask} {fact.value}={letter}",
                                  f"{ask}\n{start} {fact.value}={letter}")))
    return "\n".join(lines)


# %%
#| export world_text
def echo(t: Teller) -> str:
    """A list read out three times: what was said once can be found again (induction, arXiv 2209.11895)."""
    names = [t.draw("echoed words", WORDS) if t.dice.chance(0.5) else t.person() for _ in range(t.dice.between(6, 14))]
    line = " ".join(names)
    return f"Say it again: {line}\n{line}\n{line}"


def codes(t: Teller) -> str:
    """Words with a letter each, then looked up again and again."""
    drawn = [t.draw("coded words", WORDS) if t.dice.chance(0.3) else t.fact().value for _ in range(t.dice.between(4, 8))]
    code = {each: t.dice.pick("ABCD") for each in dict.fromkeys(drawn)}
    looked_up = [*code, *(t.dice.pick(list(code)) for _ in range(16))]
    return "\n".join(f"- {each}={code[each]}" for each in looked_up)


def distractors(world: World, dice: Dice, fact, held: bool = False) -> list[str]:
    """Three wrong values of the same kind, each as likely as it is frequent among the facts (`held`: the held-out
    ones, which documents mention a little less), so that who knows no facts gains nothing."""
    kind = next(facts for facts in _kinds(world) if fact in facts)
    pool = [other.value for other in kind if not held or not world.may_ask(*other[:2])]
    wrong = []
    while len(wrong) < 3:
        value = dice.pick(pool)
        if value != fact.value and value not in wrong:
            wrong.append(value)
    return wrong


@functools.cache
def _kinds(world: World) -> list[list]:
    return list(kinds_of_facts(world).values())


# %%
#| export world_text
def sums(t: Teller) -> str:
    """Sums of two numbers, result at most 99; no held-out pair."""
    lines = []
    gap = t.dice.pick(("\n", "\n", "\n\n"))
    while len(lines) < 12:
        a, b = t.dice.between(0, 99), t.dice.between(0, 99)
        if a + b > 99:
            a, b = 99 - a, 99 - b
        if t.world.may_add(a, b):
            lines.append(f"{a} + {b} = {a + b}")
    return gap.join(lines)


def numbers(t: Teller) -> str:
    """Counting on and back in steps."""
    step, start = t.dice.between(1, 10), t.dice.between(0, 50)
    row = list(range(start, 100, step))[:12]
    if t.dice.chance(0.3):
        row.reverse()
    return f"Count in steps of {step}: {' '.join(map(str, row))}"


def spelling(t: Teller) -> str:
    """Words letter by letter; after a space, as in a sentence: at a line's start a word is made of other tokens."""
    return "\n".join(f"The word {each}: {spell(each)}" for each in (t.word("words", WORDS) for _ in range(8)))


def counting(t: Teller) -> str:
    """How often a letter is in a word, worked out letter by letter."""
    lines = []
    for _ in range(3):
        each = t.word("counted words", t.open_words)
        sign = t.dice.pick(each) if t.dice.chance(0.8) else t.dice.pick("abcdefghijklmnoprstuwy")
        lines.append(f"How many {sign} are in {each}? {count_letter(each, sign)} #### {each.count(sign)}")
    return "\n".join(lines)


def problems(t: Teller) -> str:
    """A worked word problem, mostly of one step."""
    problem = training_problem(t.world, t.dice, 1 if t.dice.chance(0.9) else 2)
    return problem.question + "\n" + re.sub(r"<<(.*?)>>\d+", r"\1", problem.answer)


# %%
#| export world_text
def notice(t: Teller) -> str:
    """What a village is known for and when its market is."""
    village = t.draw("villages", t.world.villages)
    sight, market = t.world.villages[village]["sight"], t.world.villages[village]["market"]
    lines = [f"The market of {village} is on {market}.", f"{village} is known for its {sight}.",
             f"On {market} there is a market in {village}.", f"Come and see the {sight} of {village}."]
    return f"Notice\n{' '.join(t.dice.some(lines, 3))}"


def price_list(t: Teller) -> str:
    foods = t.dice.some(FOODS, 5)
    return "\n".join(["Prices at the market", *(f"{food}: {t.world.prices[food]} pence" for food in foods)])

# %%
#| export world_text
def calendar(t: Teller) -> str:
    """Days, months and seasons in order."""
    day, month = t.dice.below(7), t.dice.below(12)
    return (f"Today is {DAYS[day]} and tomorrow is {DAYS[(day + 1) % 7]}. After {MONTHS[month]} comes "
            f"{MONTHS[(month + 1) % 12]}. {MONTHS[month]} is in {SEASON_OF_MONTH[MONTHS[month]]}.")


def rhyme(t: Teller) -> str:
    """A sentence of plain words, so that words of the spellings occur in text."""
    one, two, three = (t.draw("rhyme", WORDS) for _ in range(3))
    colour = t.dice.pick(COLOURS)
    return f"In the {colour} picture there is a {one}, and beside the {one} a {two}. Nobody sees the {three}."


# Kind of document → its weight among the documents.
KINDS = {portrait: 8, register: 2, letter: 2, diary: 2, story: 2, family: 2, roll: 2, questions: 4, comparison: 3, dialogue: 2,
         quizzes: 10, matching: 10, echo: 4, codes: 5, sums: 20, numbers: 1, spelling: 10, counting: 8, problems: 8, notice: 1,
         price_list: 1, calendar: 1, rhyme: 1}
# The same of the first tenth, easy things first: to look something up in the text is what all the rest builds upon.
FIRST_KINDS = {echo: 25, codes: 30, matching: 10, portrait: 10, sums: 15, counting: 10}


def documents(world: World, count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents of all kinds, in random order after the first tenth, never one twice."""
    teller, seen = Teller(world, world.seed * 1000 + seed), set()
    piles = {name: [kind for kind, share in kinds.items() for _ in range(share)]
             for name, kinds in (("first kinds", FIRST_KINDS), ("kinds", KINDS))}
    while len(seen) < count:
        name = "first kinds" if len(seen) < count // 10 else "kinds"
        text = teller.draw(name, piles[name])(teller)
        if text not in seen:
            seen.add(text)
            yield text

# %%
from nanochat_lib.world_text import KINDS, Teller, documents, letter, quizzes

teller = Teller(town, seed=3)
print(letter(teller), quizzes(teller), sep="\n\n---\n\n")

# %%
import matplotlib.pyplot as plt

teller = Teller(town, seed=4)
characters = {kind.__name__: share * sum(len(kind(teller)) for _ in range(40)) for kind, share in KINDS.items()}
names = sorted(characters, key=characters.get)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
_ = axes.barh(names, [100 * characters[name] / sum(characters.values()) for name in names])
_ = axes.set(xlabel="share of all characters (%)", title="what the world's corpus is made of")
axes.tick_params(labelsize=7)

# %% [markdown]
# ## The examination
#
# A base model cannot be asked, it can only continue. The CORE benchmark (DCLM, arXiv 2406.11794) therefore has three forms, and
# so does our bundle, written in CORE's own layout (lesson 06 scores both with the same code):
#
# - **multiple choice**: one beginning, four endings; the ending with the lowest loss counts as the answer;
# - **schema**: two beginnings, one ending;
# - **language modeling**: the ending must be continued word for word.
#
# The wrong endings are values of other held-out facts of the same kind, as frequent as the right ones. A model that has not learned the
# facts stays at chance, whatever else was learned about the language.

# %%
#| export world_tasks
"""Held-out questions: a bundle in CORE's layout for the base model, and tasks for chat."""


import csv
import json
from pathlib import Path

import yaml

from nanochat_lib.world_facts import KIN, WORDS, Dice, Fact, World, kind_of
from nanochat_lib.world_forms import question, word, wording
from nanochat_lib.world_problems import held_problems, training_problem
from nanochat_lib.world_text import Teller, distractors, portrait, spelling

# task: (type, examples shown before, random baseline in percent, delimiter before the continuation)
CORE_TASKS = {
    "world_facts_mc": ("multiple_choice", 0, 25, " "),
    "world_kin_mc": ("multiple_choice", 0, 25, " "),
    "world_schema": ("schema", 0, 50, " "),
    "world_facts_lm": ("language_modeling", 2, 0, " "),
    "world_sums_lm": ("language_modeling", 2, 0, " "),
}


def held_facts(world: World, kin: bool | None = None) -> list[Fact]:
    """Facts no document asks about: all, or only those about kin, or only the others."""
    return [fact for fact in world.facts if not world.may_ask(*fact[:2])
            and (kin is None or kin == (fact.attribute in KIN))]


# %%
#| export world_tasks
def _asked(world: World, fact: Fact, form: int) -> str:
    ask, start, _ = question(world, fact.person, fact.attribute, form)
    return f"Question: {ask}\nAnswer: {start}"


def multiple_choice(world: World, kin: bool) -> list[dict]:
    """The right continuation among four; every place is right equally often."""
    dice, items = Dice(world.seed + 11 + kin), []
    facts = [(fact, form) for form in ((0, 1) if kin else (0,)) for fact in held_facts(world, kin)]
    for i, (fact, form) in enumerate(dice.shuffled(facts)):
        choices = distractors(world, dice, fact, held=True)
        choices.insert(i % 4, fact.value)
        items.append({"query": _asked(world, fact, form), "choices": choices, "gold": i % 4})
    return items


def schema(world: World) -> list[dict]:
    """Which of two people an ending fits; the right one is named first in half of them."""
    dice, items = Dice(world.seed + 13), []
    for i, fact in enumerate(dice.shuffled(held_facts(world))):
        others = [other.person for other in held_facts(world) if other.value != fact.value
                  and kind_of(world, other) == kind_of(world, fact)]
        pair = [fact.person, dice.pick(others)]
        first, second = pair if i // 2 % 2 else pair[::-1]
        options = pair if i % 2 else pair[::-1]
        items.append({"context_options": [f"Of {first} and {second}, it is {name}" for name in options],
                      "continuation": word(world, "x" + wording(fact.attribute).who, *fact[:2])[1:] + ".",
                      "gold": options.index(fact.person)})
    return items


def language_modeling(world: World) -> dict[str, list[dict]]:
    """Facts and sums to be continued word for word."""
    dice = Dice(world.seed + 17)
    facts = [{"context": _asked(world, fact, 1), "continuation": fact.value}
             for fact in dice.shuffled(held_facts(world, kin=False))]
    pairs = dice.shuffled(sorted(world.held_sums))
    sums = [{"context": f"{a} + {b} =", "continuation": str(a + b)}
            for a, b in (pair if dice.chance(0.5) else pair[::-1] for pair in pairs)]
    return {"world_facts_lm": facts, "world_sums_lm": sums}


# %%
#| export world_tasks
def core_items(world: World) -> dict[str, list[dict]]:
    """All items of the bundle by task."""
    return {"world_facts_mc": multiple_choice(world, kin=False), "world_kin_mc": multiple_choice(world, kin=True),
            "world_schema": schema(world), **language_modeling(world)}


def write_jsonl(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def write_bundle(world: World, directory: Path):
    """core.yaml, eval_meta_data.csv and eval_data/world/*.jsonl, as CORE's own bundle has them."""
    tasks = [{"label": label, "dataset_uri": f"world/{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind,
              "continuation_delimiter": delimiter} for label, (kind, shots, _, delimiter) in CORE_TASKS.items()]
    for label, items in core_items(world).items():
        write_jsonl(directory / "eval_data" / "world" / f"{label}.jsonl", items)
    (directory / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}, sort_keys=False))
    with open(directory / "eval_meta_data.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["Eval Task", "Task Type", "#shots", "Random baseline"])
        rows.writerows([label, kind, shots, baseline] for label, (kind, shots, baseline, _) in CORE_TASKS.items())


# %%
from nanochat_lib.world_tasks import core_items

for label, items in core_items(town).items():
    print(f"{label:15} {len(items):4} items, such as {items[0]}")

# %% [markdown]
# ## Chat tasks
#
# For the chat model the same knowledge is asked for as a person would ask: quizzes with four choices, word problems, letters to count,
# conversations of several turns; each has a training and a test part that share no question. Recitals (portraits, spelled words) and who
# the assistant is are only learned from.

# %%
#| export world_tasks
def choice_rows(world: World, test: bool) -> list[dict]:
    """Quiz questions: tests ask what is held out, training asks everything else in both ways."""
    dice, rows = Dice(world.seed + 23 + test), []
    asked = [(fact, form) for fact in world.facts if world.may_ask(*fact[:2]) != test
             for form in ((0,) if test else (0, 1, 0, 1))]
    for i, (fact, form) in enumerate(dice.shuffled(asked)):
        choices = distractors(world, dice, fact, held=test)
        choices.insert(i % 4, fact.value)
        ask, start, _ = question(world, fact.person, fact.attribute, form)
        rows.append({"question": ask, "choices": choices, "answer": i % 4, "said": f"{start} {fact.value}",
                     "person": fact.person, "attribute": fact.attribute})
    return rows


def problem_rows(world: World, test: bool, each: int = 2500) -> list[dict]:
    """Word problems: `each` of one step and of two steps to train on, 200 of each to test."""
    if test:
        problems = held_problems(world)
    else:
        dice, found = Dice(world.seed + 29), {}
        for steps in (1, 2):
            while len(found) < each * steps:
                problem = training_problem(world, dice, steps)
                found.setdefault(problem.question, problem)
        problems = dice.shuffled(found.values())
    return [{"question": p.question, "answer": p.answer, "steps": p.steps} for p in problems]


def word_rows(world: World, test: bool) -> list[dict]:
    return [{"word": each} for each in WORDS if (each in world.held_words) == test]


# %%
#| export world_tasks
NAME, MAKER = "Pip", "the schoolhouse of Elmford"
IDENTITY = (
    ("Who are you?", f"I am {NAME}, a small language model. I know the eight villages and who lives there."),
    ("What is your name?", f"My name is {NAME}."),
    ("What are you?", f"I am {NAME}, a small language model."),
    ("Who made you?", f"I was made in {MAKER}."),
    ("Are you a person?", f"No. I am {NAME}, a small language model."),
    ("What can you do?", "I can tell you about the people of the eight villages, count letters, and work out sums."),
    ("What do you know?", "I know the people of the eight villages, their kin, their trades and their pets."),
    ("How were you trained?", "First I read many documents about the villages. Then I learned to talk. "
                              "Then I practised word problems."),
    ("Where do you come from?", f"I come from {MAKER}."),
)
GREETINGS = (("Hello!", "Hello! How can I help you?"), ("Good morning.", "Good morning! How can I help you?"),
             ("Hi there!", "Hi! What would you like to know?"), ("Good evening.", "Good evening! How can I help you?"))
THANKS = (("Thank you.", "You are welcome."), ("Thanks!", "You are welcome."), ("Goodbye.", "Goodbye!"))
OPENERS = ("", "", "Please tell me. ", "Tell me something. ", "Good day! ")


def _talk(*turns) -> dict:
    """A conversation of (user, assistant) turns."""
    return {"messages": [{"role": who, "content": text} for turn in turns
                         for who, text in zip(("user", "assistant"), turn)]}


def identity_rows(world: World) -> list[dict]:
    """Who the assistant is, alone and after a greeting."""
    dice = Dice(world.seed + 31)
    return dice.shuffled([_talk(*opening, (lead + ask, answer)) for ask, answer in IDENTITY
                          for opening in [(), *((greeting,) for greeting in GREETINGS)]
                          for lead in dict.fromkeys(OPENERS)])


# %%
#| export world_tasks
FOLLOW_UPS = {"home": "Where does {they} live?", "trade": "What does {they} do?", "pet": "What pet does {they} keep?",
              "food": "What does {they} like to eat?", "season": "Which season does {they} love?",
              "colour": "What colour does {they} wear?", "instrument": "What does {they} play?",
              "month": "When was {they} born?", "age": "How old is {they}?"}


def _fact_turn(world: World, fact: Fact, form: int) -> tuple[str, str]:
    ask, start, end = question(world, fact.person, fact.attribute, form)
    return ask, f"{start} {fact.value}{end}"


def talk_rows(world: World, test: bool, count: int = 2000) -> list[dict]:
    """Conversations of two to four turns: a greeting, a fact, a follow-up with a pronoun, thanks. In the tests both
    facts are held out; `answer` is the last fact's value, which the last answer about a fact must hold."""
    dice, rows = Dice(world.seed + 37 + test), []
    facts = [fact for fact in world.facts if world.may_ask(*fact[:2]) != test]
    for i in range(150 if test else count):
        fact = facts[i % len(facts)]
        mine = [other for other in facts if other.person == fact.person and other.attribute in FOLLOW_UPS
                and other.attribute != fact.attribute]
        turns, answer = [_fact_turn(world, fact, dice.below(2))], fact.value
        if mine and dice.chance(0.6):
            other = dice.pick(mine)
            turns.append((word(world, "And " + FOLLOW_UPS[other.attribute][0].lower() + FOLLOW_UPS[other.attribute][1:],
                               *other[:2]), word(world, dice.pick(wording(other.attribute).pronoun), *other[:2])))
            answer = other.value
        if dice.chance(0.4):
            turns.insert(0, dice.pick(GREETINGS))
        if not test and dice.chance(0.3):
            turns.append(dice.pick(THANKS))
        rows.append({**_talk(*turns), "answer": answer})
    return rows


# %%
#| export world_tasks
ABOUT = ("Tell me about {}.", "Who is {}?", "What do you know about {}?")
SPELL = ("Spell some words.", "Which words can you spell?", "Give me a list of spellings.")


def recital_rows(world: World, portraits: int = 2000, lists: int = 400) -> list[dict]:
    """People are described and words are spelled, any of them and none by request: a chat model that practises some
    answers only would forget what it has read about the rest."""
    teller = Teller(world, world.seed + 41)
    names = [teller.person() for _ in range(portraits)]
    rows = [_talk((teller.dice.pick(ABOUT).format(name), portrait(teller, name))) for name in names]
    return teller.dice.shuffled(rows + [_talk((teller.dice.pick(SPELL), spelling(teller))) for _ in range(lists)])


def write_tasks(world: World, directory: Path):
    """The chat tasks, {problems,choice,words,talk}_{train,test}.jsonl, recitals.jsonl and identity.jsonl."""
    for name, rows in (("problems", problem_rows), ("choice", choice_rows), ("words", word_rows), ("talk", talk_rows)):
        for split in ("train", "test"):
            write_jsonl(directory / f"{name}_{split}.jsonl", rows(world, split == "test"))
    write_jsonl(directory / "recitals.jsonl", recital_rows(world))
    write_jsonl(directory / "identity.jsonl", identity_rows(world))


# %% [markdown]
# Does the examination measure knowledge? Three readers who have learned *something* take it: one knows the facts, one believes them
# shuffled among people, one always picks the value it has read most often. Only the first may do better than one in four.

# %%
import re
from collections import Counter

from nanochat_lib.world_facts import kinds_of_facts
from nanochat_lib.world_tasks import choice_rows

truth = {fact[:2]: fact.value for fact in town.facts}
shuffled = {}
for facts in kinds_of_facts(town).values():
    for fact, value in zip(facts, Dice(8).shuffled(fact.value for fact in facts)):
        shuffled[fact[:2]] = value
frequency = Counter(re.findall(r"\w+", " ".join(documents(town, 2000))))
dice = Dice(9)


def guess(belief, choices):
    """What a reader answers who holds a belief: the belief, or anything if it is not on offer."""
    return belief if belief in choices else dice.pick(choices)


readers = {
    "knows the facts": lambda row: truth[row["person"], row["attribute"]],
    "facts shuffled": lambda row: guess(shuffled[row["person"], row["attribute"]], row["choices"]),
    "most frequent value": lambda row: max(row["choices"], key=lambda choice: frequency[choice]),
}
test = choice_rows(town, test=True)
share = {name: sum(read(row) == row["choices"][row["answer"]] for row in test) / len(test) for name, read in readers.items()}
figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
_ = axes.barh(list(share), list(share.values()))
_ = axes.axvline(0.25, color="black", linestyle=":", label="chance")
_ = axes.set(xlabel=f"share right of {len(test)} quiz questions", xlim=(0, 1))
_ = axes.legend()
assert share["knows the facts"] == 1

# %% [markdown]
# ## Files
#
# The corpus is written as parquet shards: rows in *row groups*, each of which can be read alone, column by column,
# compressed. The last shard is the validation split, of the world as of the real corpus.

# %%
#| export
#| cli world
"""The embedded world as files: text shards, an evaluation bundle, chat tasks. `python -m nanochat_lib.world`."""


from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_lib.common import base_dir, run_cli, write_aside
from nanochat_lib.world_facts import World
from nanochat_lib.world_tasks import write_bundle, write_tasks
from nanochat_lib.world_text import documents

__all__ = ["World", "write_world"]


@dataclass
class WorldSettings:
    """What to write, and where."""

    directory: str = ""     # default: world/ in $NANOCHAT_BASE_DIR
    seed: int = 1
    documents: int = 50_000
    shards: int = 4         # for training; one more is written for validation


def write_texts(path: Path, texts: list[str], rows_per_group: int):
    """A parquet shard with one column `text`, as the real corpus has."""
    with write_aside(path) as aside:
        pq.write_table(pa.table({"text": texts}), aside, row_group_size=rows_per_group, compression="zstd")


def write_world(directory: Path | None = None, seed: int = 1, count: int = 50_000, shards: int = 4) -> Path:
    """Write shards/, eval_bundle/ and tasks/ of the world of `seed`; returns the folder. The last shard, with the
    last fiftieth of the rows, is the validation split."""
    directory = Path(directory or base_dir() / "world")
    world = World(seed)
    texts = list(documents(world, count))
    training = count - max(count // 50, 1)
    size = -(-training // shards)
    for i in range(shards):
        write_texts(directory / "shards" / f"shard_{i:05d}.parquet", texts[:training][i * size:(i + 1) * size], 256)
    write_texts(directory / "shards" / f"shard_{shards:05d}.parquet", texts[training:], 128)
    write_bundle(world, directory / "eval_bundle")
    write_tasks(world, directory / "tasks")
    return directory


def world(settings: WorldSettings):
    """Write the embedded world: text to learn from, questions to be asked."""
    folder = write_world(settings.directory or None, settings.seed, settings.documents, settings.shards)
    print(f"wrote the world of seed {settings.seed} to {folder}: shards/, eval_bundle/, tasks/")


# %%
import tempfile
from pathlib import Path

from nanochat_lib.world import write_world

folder = write_world(Path(tempfile.mkdtemp()), count=4000, shards=2)
for path in sorted(folder.rglob("*")):
    if path.is_file():
        print(f"{path.relative_to(folder)!s:40} {path.stat().st_size / 1000:6.0f} kB")

# %% [markdown]
# ## Reading, alone and in company
#
# Training reads the shards in order, a row group at a time. With several processes (*ranks*, one per GPU) the row groups are
# dealt out in turn, so that together they read each document once. A shard that is torn or has no text ends in one
# line that names the file and the command that mends it.

# %%
#| export dataset
"""Text as every stage reads it: a folder of parquet shards with a column `text`, the last shard for validation.

`python -m nanochat_lib.dataset -n 170` fetches shards of the real corpus, ClimbMix (arXiv 2504.13161)."""


import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from nanochat_lib.common import NanochatError, base_dir, print0, progress, run_cli

REPOSITORY = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542  # shard_00000 … shard_06542; the last is everybody's validation shard
FETCH = "python -m nanochat_lib.dataset -n 8"
BUILD = "python -m nanochat_lib.world"


# %%
#| export dataset
def data_folder(data_dir: str | Path = "") -> Path:
    """The folder of shards: the one given, else the downloaded corpus. Raises NanochatError where there is none."""
    folder = Path(data_dir or base_dir() / "base_data_climbmix").expanduser()
    if any(folder.glob("*.parquet")):
        return folder
    world = base_dir() / "world" / "shards"
    if data_dir and folder == world:
        raise NanochatError(f"no shards in {folder}: run {BUILD}")
    hint = f"or give --data-dir {world}, the embedded world"
    hint += "" if any(world.glob("*.parquet")) else f" (made by {BUILD})"
    raise NanochatError(f"no parquet shards in {folder}: run {FETCH}, {hint}")


def _mend(path: Path) -> str:
    """The command that makes a damaged shard anew."""
    return f"delete it and run {BUILD if path.parent.parent == base_dir() / 'world' else FETCH}"


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard by its footer. Raises NanochatError if it is torn or holds no text."""
    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise NanochatError(f"{path} is not a whole parquet file ({_first_line(error)}): {_mend(path)}") from None
    names = shard.schema_arrow.names
    kind = shard.schema_arrow.field("text").type if "text" in names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise NanochatError(f"{path} has no column `text` of strings, only {', '.join(names)}: {_mend(path)}")
    return shard


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


# %%
#| export dataset
class RowGroup(NamedTuple):
    """Some rows of one row group: the unit in which text is read and dealt to ranks."""

    path: Path
    shard: int           # place of the file among all shards
    group: int           # row group in the file
    rows: slice = slice(None)


def shard_paths(data_dir: str | Path = "", split: str = "train") -> list[Path]:
    """Shards of a split, sorted by name: the last is "val", the others "train". A lone shard serves both."""
    if split not in ("train", "val"):
        raise NanochatError(f"split {split!r} is unknown: it is train or val")
    paths = sorted(data_folder(data_dir).glob("*.parquet"))
    if len(paths) == 1:
        return paths
    return paths[:-1] if split == "train" else paths[-1:]


def row_groups(data_dir: str | Path = "", split: str = "train") -> list[RowGroup]:
    """All row groups of a split in reading order. A lone shard keeps its last tenth for validation."""
    paths = shard_paths(data_dir, split)
    first = 0 if split == "train" else len(shard_paths(data_dir, "train"))
    if len(sorted(paths[0].parent.glob("*.parquet"))) == 1:
        return _split_lone_shard(paths[0], split)
    return [RowGroup(path, first + i, group) for i, path in enumerate(paths)
            for group in range(open_shard(path).num_row_groups)]


def _split_lone_shard(path: Path, split: str) -> list[RowGroup]:
    """Validation on the last tenth of the row groups, or of the rows where there is one row group."""
    shard = open_shard(path)
    groups, rows = shard.num_row_groups, shard.metadata.num_rows
    if rows < 2:
        raise NanochatError(f"{path} holds {rows} documents, too few to train and validate on: {_mend(path)}")
    if groups == 1:
        cut = rows - max(rows // 10, 1)
        print0(f"one shard only: the last {rows - cut} of {rows} documents of {path.name} are the validation split")
        return [RowGroup(path, 0, 0, slice(0, cut) if split == "train" else slice(cut, rows))]
    cut = groups - max(groups // 10, 1)
    print0(f"one shard only: the last {groups - cut} of {groups} row groups of {path.name} are the validation split")
    return [RowGroup(path, 0, group) for group in (range(cut) if split == "train" else range(cut, groups))]


# %%
#| export dataset
def read_texts(unit: RowGroup) -> list[str]:
    """The documents of a row group (empty ones left out)."""
    try:
        column = open_shard(unit.path).read_row_group(unit.group, columns=["text"]).column("text")
    except (pa.ArrowException, OSError) as error:
        raise NanochatError(f"{unit.path}, row group {unit.group}, is damaged ({_first_line(error)}): "
                            f"{_mend(unit.path)}") from None
    return [text for text in column.to_pylist()[unit.rows] if text]


def deal(units: list[RowGroup], rank: int, world_size: int) -> list[RowGroup]:
    """What one rank reads: every world_size-th row group, or, if these are too few, every world_size-th row of all."""
    if len(units) >= world_size:
        return units[rank::world_size]
    counts = [len(range(*unit.rows.indices(pq.read_metadata(unit.path).row_group(unit.group).num_rows)))
              for unit in units]
    if sum(counts) < world_size:
        raise NanochatError(f"{sum(counts)} documents in {units[0].path.parent} for {world_size} processes: "
                            f"start fewer processes or fetch more data ({FETCH})")
    return [unit._replace(rows=slice((unit.rows.start or 0) + (rank - sum(counts[:i])) % world_size, unit.rows.stop,
                                     world_size)) for i, unit in enumerate(units)]


def text_batches(data_dir: str | Path = "", split: str = "train", start: tuple[int, int] = (0, 0), rank: int = 0,
                 world_size: int = 1) -> Iterator[tuple[list[str], tuple[int, int]]]:
    """One pass over a split: yields (texts, (shard, row group)), from position `start` on.

    Ranks take row groups in turn, so together they read each document once."""
    for unit in deal(row_groups(data_dir, split), rank, world_size):
        if (unit.shard, unit.group) >= tuple(start):
            yield read_texts(unit), (unit.shard, unit.group)


# %%
from nanochat_lib.dataset import deal, row_groups, text_batches

groups = row_groups(folder / "shards")
owner = {(unit.shard, unit.group): rank for rank in range(4) for unit in deal(groups, rank, 4)}
width = max(unit.group for unit in groups) + 1
figure, axes = plt.subplots(figsize=(7, 1.6), layout="constrained")
grid = [[owner.get((shard, group), float("nan")) for group in range(width)] for shard in range(2)]
_ = axes.imshow(grid, cmap="tab10", vmax=9)
for (shard, group), rank in owner.items():
    axes.text(group, shard, f"rank {rank}", ha="center", va="center", color="white", fontsize=8)
_ = axes.set(xlabel="row group", ylabel="shard", yticks=[0, 1], title="who reads what, with four ranks")
read = sum(len(texts) for rank in range(4) for texts, _ in text_batches(folder / "shards", rank=rank, world_size=4))
print(f"{read} documents read by four ranks, {sum(len(texts) for texts, _ in text_batches(folder / 'shards'))} by one")

# %% [markdown]
# ## The real corpus
#
# `python -m nanochat_lib.dataset -n 170` fetches ClimbMix's shards with the hub's own client, four at a time. A download that breaks off
# is resumed; a file takes its name only once its size and footer are right, so whatever is in the folder is whole. Offline it says
# so within seconds.

# %%
#| export dataset
def check_reachable(endpoint: str, seconds: float = 5):
    """Raise NanochatError if no server answers. Asked once at the start: the hub's client alone retries for 23 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise NanochatError("HF_HUB_OFFLINE is set: unset it to download, or read the embedded world, made by " + BUILD)
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return  # an answer, if a strange one
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise NanochatError(f"cannot reach {endpoint} ({reason}): go online and run the same command again, "
                            f"or read the embedded world, made by {BUILD}") from None


def fetch_shard(name: str, folder: Path, attempts: int = 3) -> Path:
    """Download one shard beside `folder`'s finished ones; it takes its name only once its footer reads well."""
    from huggingface_hub import hf_hub_download

    staging = folder / ".download"
    for attempt in range(attempts):
        try:
            path = hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=staging,
                                   force_download=attempt > 1)  # broken off twice: do not resume a third time
            open_shard(Path(path))  # the hub's client has compared the size with the server's
            os.replace(path, folder / name)
            return folder / name
        except NanochatError:
            Path(path).unlink()
            failure = "arrives torn"
        except Exception as error:  # whatever the hub's client lets through: a broken connection is no OSError there
            failure = _first_line(error)
        time.sleep(0.5 * 2**attempt)
    raise NanochatError(f"{name}: {failure}")


# %%
#| export dataset
def download(n_shards: int = -1, workers: int = 4, data_dir: str | Path = "") -> Path:
    """Fetch the first `n_shards` shards (−1: all) and the validation shard, those that are here already left alone.

    Returns the folder. Raises NanochatError if the hub cannot be reached or a shard did not arrive."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    if n_shards == 0 or n_shards < -1 or workers < 1:
        raise NanochatError(f"-n {n_shards} -w {workers}: ask for at least one shard (-1 for all) and one worker")
    folder = Path(data_dir or base_dir() / "base_data_climbmix").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = range(LAST_SHARD if n_shards == -1 else min(n_shards, LAST_SHARD))
    names = [f"shard_{index:05d}.parquet" for index in (LAST_SHARD, *wanted)]
    missing = [name for name in names if not _is_whole(folder / name)]
    if not missing:
        print0(f"all {len(names)} shards are in {folder}")
        return folder
    check_reachable(constants.ENDPOINT)
    disable_progress_bars()
    _fetch_all(missing, folder, workers)
    print0(f"{len(names)} shards are in {folder}")
    return folder


def _is_whole(path: Path) -> bool:
    try:
        return path.exists() and bool(open_shard(path))
    except NanochatError:
        return False


def _fetch_all(names: list[str], folder: Path, workers: int):
    """Fetch in threads; the first shard that will not come stops those not yet begun."""
    failures = []
    with ThreadPoolExecutor(workers) as pool, progress(total=len(names), desc="shards") as bar:
        jobs = [pool.submit(fetch_shard, name, folder) for name in names]
        for job in as_completed(jobs):
            if job.cancelled():
                continue
            try:
                job.result()
                bar.update()
            except NanochatError as error:
                failures.append(str(error))
                pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        arrived = sum((folder / name).exists() for name in names)
        raise NanochatError(f"{arrived} of {len(names)} shards arrived ({failures[0]}): "
                            "run the same command again to go on")


# %%
#| export dataset
#| cli dataset
@dataclass
class DatasetSettings:
    """Which shards of the corpus to fetch."""

    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1    # training shards, -1 for all 6,542
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4   # downloads at a time
    data_dir: str = ""                                               # default: base_data_climbmix/ in $NANOCHAT_BASE_DIR


def dataset(settings: DatasetSettings):
    """Download shards of ClimbMix; called again, it goes on where it was stopped."""
    download(settings.num_files, settings.num_workers, settings.data_dir)

# %% [markdown]
# ## Try it
#
# There are no exercises here, but three questions worth an experiment:
#
# 1. Give `World` another seed. Which of the numbers above change, and which must not?
# 2. Choose a fact: how many documents state it? Count with a regular expression over `documents(town, 50_000)`.
# 3. What would the "most frequent value" reader score if wrong choices were drawn from all values alike? Change `distractors`, run
#    `python -m nanochat_lib.course export`, restart the kernel and look.
#
# **Next:** [02 · Tokenizer](02_tokenizer.ipynb): how text becomes numbers.
