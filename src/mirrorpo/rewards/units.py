"""Units and counted things that may follow a number.

A word after a number is a unit only if it is listed here: "6 squared", "6 dozen" and "6k" are not six of something.
"""

from __future__ import annotations

import re
from functools import lru_cache

from mirrorpo.rewards.notation import words

# Measures, with every way to write them. Two measures that differ make two answers differ.
_MEASURES = """
mm millimeter millimetre | cm centimeter centimetre | dm decimeter decimetre | m meter metre mtr
km kilometer kilometre | inch in inche " | foot feet ft ' | yard yd | mile mi | lightyear light-year | mg milligram
g gram gramme gm | kg kilogram kilo | tonne ton | ounce oz | pound lb lbs £ gbp quid | stone
ml milliliter millilitre cc | cl | l liter litre | gallon gal | quart qt | pint pt | cup | tablespoon tbsp
teaspoon tsp | ms millisecond | second sec s | minute min mins | hour hr hrs h | day | week wk | fortnight
month mo | year yr yrs | decade | century centuries | night | weekend | degree deg ° | °c celsius | °f fahrenheit
kelvin | radian rad | dollar usd buck $ | cent ¢ | euro eur € | yen jpy ¥ | rupee rs inr ₹ | peso | franc chf
penny pennies pence | yuan rmb cny | won ₩ | ruble rouble ₽ | baht ฿ | krona kronor krone | shilling | mph | kph kmh
hectare ha | acre | newton | joule | kj kilojoule | watt | kw kilowatt | kwh | volt | ampere amp | ohm | pascal pa
hertz hz | calorie cal | kcal kilocalorie | mole mol | bit | byte | kb kilobyte | mb megabyte | gb gigabyte | am a.m
pm p.m | o'clock | knot | bushel | barrel | mil
"""
_COUNTED = """
action activity adult airplane album animal answer ant apartment apple apricot area arrangement arrow article
assignment athlete award baby bag bagel ball balloon banana band bar barrel basket basketball bat bath battery beach
bead bean bear bed bee beer bell belt bench bike bill bird birthday biscuit block blouse board boat book bottle
bouquet bowl box boxes boy bracelet branch bread breads brick bridge brother brownie bucket bud bug building bulb
bullet bun bunch bunny bus buses bush bushes business businesses butterfly button cabbage cabin cake call calf candle
candy candies cane can captain car card carnation carpet carrot cart carton case cat caterpillar cave cd cell chair
chapter cheese cherry cherries chick chicken child children chip chocolate choice circle city cities class classes
clip clock cloud club coach coaches coat coconut coffee coin color colour combination comic company companies computer
cone contestant container cookie corner costume couch couches country countries county couple course cousin cow crab
cracker crane crate crayon creature crocodile crew cricket croissant cubes cucumber cupcake customer daffodil daisy
daisies dancer date deer delegate dentist desk dessert diamond dinner dinosaur dish dishes disk diver doctor dog doll
dolphin donut door dot doughnut dragon drawer drawing dress dresses drink driver drop duck dvd ear earring edge egg
elephant element email employee engine envelope eraser error even event exam example exercise eye face factor factory
family families fan farm farmer feather fence field figure file film finger fireman firefighter fish fishes flag
flamingo flat flea flight floor flower fly flies folder follower fork fraction friend frog fruit function furniture
game garden gem gift giraffe girl glass glasses glove goal goat goldfish goose geese grandchild grandchildren grape
grapefruit grass group guest guitar guppy gumball gum gun gym haircut ham hamburger hammer hand handful hat head heart
helmet hen hole holiday homework horse hospital hostage hotdog hotel house human husband iceberg icecream invitation
island item jacket jar jersey jelly jewel job joke juice jump kangaroo kernel key keychain kid kitten kite kitchen
kiwi knife knives ladder lake lamb lamp lap laptop leaf leaves leg legs lego lemon letter level library libraries
light lily lilies line lion lizard load loaf loaves lobster locker log lollipop loop loss losses lot lunch lunches
machine magazine magnet man mango mangoes manuscript map marble mark marker mask mat match matches meal meatball medal
meeting melon member message minnow mistake mom monkey mosquito mosquitoes mother motorcycle mouse mice mountain movie
muffin mug mushroom nail name neckles necklace neighbor neighbour nest newspaper nickel node note notebook novel
number nurse nut octopus office officer onion operation option orange orchid order orphan outfit owl ox oxen oyster
pack package packet pad page paint painting paper paperclip parade parent park parrot part participant partner party
parties passenger patch patches patient path peach peaches peanut pear pearl pebble pen pencil penguin people peon
pepper permutation person photo photograph piano pickle picture pie piece pig pigeon pill pillow pineapple pipe pizza
place plane plank plant plate platter player plum point pole pond pool popsicle position possibility possibilities
post poster pot potato potatoes prize problem product program project pudding puppy puppies purse puzzle pyramid queen
question quilt rabbit raccoon race racket radish radishes rat ray recipe record red region rep repetition resident
result rib ribbon rice ring river road robot rock rod roll roof room roots rope rose round route row rug ruler run
sack salad sale sandwich sandwiches saree scarf scarves school seashell season seat section seed segment servant
serving session set shape shark sheep sheet shelf shelves shell ship shirt shoe shop shovel shrimp shrub side sign
sister sit-up situp push-up pushup skateboard skein sketch skirt slice snack snail snake sneaker snowball snowman
soccer sock soda sofa soldier solution song soup spider spoon sport spot squares squirrel stack stair stall stamp star
state station statue step stick sticker stone stool stop store story stories straw strawberry strawberries street
string student stuff subject subset suit suitcase sweater sweet swimmer table tablet tadpole tail talent task taxi
teacher team tent term test text textbook thing ticket tie tiger tile time tire tyre title toad toast toilet token
tomato tomatoes tool tooth teeth topping towel tower town toy track tractor train trail treat tree trench triangle
tricycle trip trophy trophies trouser truck trunk tshirt t-shirt tub tulip turkey turn turtle tv umbrella unicorn unit
value van vase vegetable vehicle vertex vertices video village violin visit visitor volunteer vote voter waffle wagon
walk wall water watch watches watermelon wave way whale wheel whistle wife wives window wine wing winner wolf wolves
woman women men wood wool word worker workshop worm yogurt zebra integer divisor digit zero primes outcome pattern
polygon diagonal pair cupful bunches cucumbers pounder scoop strip bite brush brushes comb diaper doorknob driveway
emerald eyelash flyer gumdrop hamster headband hoodie icicle jeans pants shorts kilobyte lightbulb mitten noodle ounce
pancake panda peso pinecone plush quiz quizzes ruby rubies saddle sapphire seagull spring starfish stitch stitches
stroller sunflower taco tart thumbtack trinket truffle uniform vacation violet wallet yoyo credit vial dose vitamin
sibling toddler teenager tourist staff colleague classmate candidate applicant client
acorn actor alligator antacid app appetizer apron aquarium arm artichoke artwork attendee aunt avocado backpack
baguette bale bandage baseball batch bathroom beaker beat bedroom beetle beignet berry bicycle billboard blackbird
blanket blister blueberry bolt bone bonnet bonus braid break brochure bubble builder bundle burger burrito buyer
cabinet camper cantaloupe cap capsule caramel cardinal carriage channel character charge cheerleader cheesecake chef
chest chore citation claim clarinet classroom claw clerk clothe clothesline clove clover clown cluster coal complaint
consonant contact copy counter coupon craft cranberry crater crop crow curler daughter deck decoration delivery
demerit device diary dime donation drum drummer duckling eggplant episode farmhand feeding female fern figurine filet
fire firecracker firework flavor flip flute footprint form fox frie frond gallery gemstone gizmo gnome grade grain
gust hair hall handshake hare highlighter hike hit hive home horseshoe household individual insect instrument
jellybean jogger jug kind ladybug latte lawn layer length lens leopard lesson lick lighter lime link llama macaron
macaroon male manager marigold marshmallow matchbox matchstick megabit milkshake millipede mink model monster napkin
nephew niece object omelet orc orchard pail pallet pamphlet pan panel papaya paragraph parsnip pastry patron paw
period pet petal petunia phone phrase pianist piglet pile pin pine pitch pixel pocket pod pointer poodle portion
postcard pouch present pretzel pumpkin pup pupil racer racquet raisin raspberry recovery rectangle reflection
restaurant revolution rhinestone rhino riddle ride ridge robin roommate rooster rotation rung runner sandcastle
sapling sausage scallop seedling semester sentence sequin setting share shot singer site skeleton skip sleeve
snowflake soap son sonnet space sparkler spear spoke spool squat stanza steak stem stingray strand streetlight stroke
subscriber subscription sucker surfer survey swallow swan system tab tack tangerine tank tarantula tattoo teacup tear
television tennis tin tissue toe toenail toothbrush toothpick toss touchdown tray trial troll truckload trumpet twig
type uncle vampire vent vibration vowel waiter waitress walnut wand wash washer weasel website weed weekday whisker
widget wig win wipe zit zomby
"""
# Words between or after them that change nothing.
_BESIDE = """
of per in a an each every for total altogether left remaining remained long old tall high wide deep away apart ago
later away the on at by his her their its my our all combined overall together more extra additional new now
per-person away and/or red blue green yellow white black pink purple orange brown gray grey silver gold big small
large little tiny short tall full half-full empty good bad different distinct possible whole real positive hot cold
fresh wooden plastic glass paper chocolate vanilla worth earned spent saved made sold bought needed used eaten read
walked traveled travelled rounded exact exactly approx sterling apiece
"""


def _table(text: str) -> dict[str, str]:
    return {word: words[0] for group in re.split(r"[|\n]", text) if (words := group.split()) for word in words}


_MEASURE = _table(_MEASURES)
_THINGS = words(_COUNTED)
_NEUTRAL = words(_BESIDE)
_POWERS = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cu": "^3", "cubed": "^3"}
# Words that make another number of the one before them, also where a reference's own words are trusted.
_CHANGING = words(
    "squared cubed factorial dozen gross score half halves third thirds fourth fourths fifth fifths sixth sixths "
    "seventh eighth ninth tenth tenths hundredth hundredths thousandth thousandths times plus minus over mod "
    "modulo choose point base power root hundred thousand million billion trillion or and to not but if than "
    "between about either nor is are was equals less more negative inverse repeating recurring approximately k pi "
    "e i radical through until versus vs maybe perhaps"
)
_WORD = re.compile(r"[A-Za-z°¢£€$¥'\"%][A-Za-z°.'\-]*")
_MEGA = words("Ms Mm Mg Ml")  # of seconds, metres, ...: not what the small letter measures
_POWER = re.compile(r"\s*\^\s*\{?\s*(-?[1-4])\s*\}?")
_FRACTION = re.compile(r"\\frac\s*\{\s*([A-Za-z ]{1,20}?)\s*\}\s*\{\s*([A-Za-z ]{1,20}?)\s*\}")
_COMPOUND = {"mph": {"mile", "/hour"}, "kph": {"km", "/hour"}, "kmh": {"km", "/hour"}}
_GLUE = re.compile(r"[\s().,]+|\\cdot|\*|·")
_MAX_LENGTH = 80

Unit = tuple[frozenset[str], frozenset[str]]  # measures, counted things
NO_UNIT: Unit = (frozenset(), frozenset())


@lru_cache(maxsize=4096)
def read_unit(text: str, *, trusted: bool = False) -> Unit | None:
    """The unit that a text after a number states.

    Args:
        text: such as " km/h", "cm^{2}" or "apples per day".
        trusted: an unknown word counts as a thing (references only).

    Returns:
        Measures (with powers, ``/`` before what is divided by) and counted things; None if the text is no unit.

    Example:
        >>> read_unit("km/h") == read_unit("kilometers per hour"), read_unit("squared"), read_unit("cm^{2}")[0]
        (True, None, frozenset({'cm^2'}))
    """
    if "\\frac" in text:
        text = _FRACTION.sub(r" \1/\2", text)
    if len(text) > _MAX_LENGTH or not _may_touch(text):
        return None
    measures, things = set[str](), set[str]()
    position, divided, power = 0, "", ""
    while position < len(text):
        if glue := _GLUE.match(text, position):
            position = glue.end()
            continue
        if text[position] == "/":
            divided, position = "/", position + 1
            continue
        word = _WORD.match(text, position)
        if word is None:
            return None
        position = word.end()
        if word[0] in _MEGA:
            return None
        name = word[0].lower().rstrip(".-")
        if name == "per":
            divided = "/"
        elif name in _POWERS and measures | things and name.endswith("ed") and not power:
            return None  # "5 metres squared" is (5 m)^2 to some and 5 m^2 to others
        elif name in _POWERS and not name.endswith("ed") and _measure(text[position:]):
            power = _POWERS[name]
        elif (measure := _known_measure(name)) is not None and not (name == "in" and _WORD.search(text, position)):
            raised = _POWER.match(text, position)
            if raised:
                position, power = raised.end(), f"^{raised[1]}"
            measures |= {divided + measure + power} if measure not in _COMPOUND else _COMPOUND[measure]
            power = ""
        elif name in _NEUTRAL or name == "in":
            continue
        elif (thing := _thing(name)) is not None or (trusted and len(name) > 2 and name not in _CHANGING):
            things.add(thing or name.removesuffix("s"))
            power = ""
        else:
            return None
    if not (measures or things) and any(len(word) == 1 for word in text.split()):
        return None  # "6 a" is a product
    if measures & {"°c", "°f"}:
        measures.discard("degree")
    return frozenset(measures), frozenset(things)


def changes(word: str) -> bool:
    """Whether a word makes another number of the one before it: "squared", "times", "or"."""
    return word.lower() in _CHANGING


def _may_touch(text: str) -> bool:
    """Whether a word may follow its number without a space: "5km", "90°", not "5m" or "6k", which may be products."""
    first = _WORD.match(text)
    if first is None or not first[0][0].isalpha():
        return True
    name = first[0].lower()
    return len(name) > 1 and (_known_measure(name) is not None or (len(name) > 3 and _thing(name) is not None))


def _measure(text: str) -> bool:
    word = _WORD.search(text)
    name = word[0].lower().rstrip(".-") if word else ""
    return name in ("unit", "units") or _known_measure(name) is not None


def _known_measure(name: str) -> str | None:
    found = _MEASURE.get(name)
    if found is None and len(name) > 3:
        found = _MEASURE.get(name.removesuffix("s")) or _MEASURE.get(name.removesuffix("es"))
    return found


def _thing(name: str) -> str | None:
    for form in (name, name.removesuffix("s"), name.removesuffix("es"), name.removesuffix("ies") + "y"):
        if form in _THINGS:
            return form.removesuffix("s")
    return None


def conflict(given: Unit, wanted: Unit) -> bool:
    """Whether two units make two answers differ: both sides have measures that differ, or things none of which agree.

    Example:
        >>> conflict(read_unit(" cm"), read_unit(" m")), conflict(read_unit(" red apples"), read_unit(" apple"))
        (True, False)
    """
    if given[0] and wanted[0] and given[0] != wanted[0]:
        return True
    return bool(given[1] and wanted[1] and not (given[0] or wanted[0]) and not given[1] & wanted[1])
